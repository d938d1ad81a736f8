#pragma once

// Loaded before libllama and on any CPU: what the other libraries need of it, and what is said when a signal ends the
// process. The Python package calls this by ctypes.

#if defined(_WIN32)
#    define SENTINEL_API __declspec(dllexport)
#else
#    define SENTINEL_API __attribute__((visibility("default")))
#endif

// the instruction sets that the compiler was allowed to use, beyond the architecture's oldest CPU; names of
// /proc/cpuinfo, each with a blank before it
SENTINEL_API const char * llama_cpp_sentinel_built_for(void);

// 1 if this CPU has the instruction set and the system lets programs use it, 0 if not, -1 if that is not known
SENTINEL_API int llama_cpp_sentinel_cpu_has(const char * name);

#if !defined(_WIN32)
// What to write to stderr when `signum` ends the process: `before`, the text that `step` points to at that moment, and
// `after`; they are not copied. Then the signal does what it would have done. Without `before` nothing is written, and a
// signal that the program handles is left alone. 0 on success, -1 where it is left alone or ignored.
SENTINEL_API int llama_cpp_sentinel_last_words(int signum, const char * before, const char * step, const char * after);

// a descriptor that gets a byte when one of these signals ends the process; -1 is none
SENTINEL_API void llama_cpp_sentinel_last_words_fd(int fd);

// a ggml_abort_callback_t: keeps the reason, which is written between step and `after`
SENTINEL_API void llama_cpp_sentinel_abort(const char * reason);
#endif
