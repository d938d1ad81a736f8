"""llama.cpp with the patches: its library, limits, memory, log, and how a `Llama` is constructed and guarded."""
