"""How the bundled model is made: data, tokenizer, model, training, and its evaluation under every schedule.

`scripts/train_needle.py` is the command. The documents themselves are written by
`swaa_local.needle.documents`, which `eval` and `demo` use too.
"""
