"""Students: what is asked for is made to fit the corpus, built, checked and written with its tokenizer.

`lokilm` is a model of our own for `transformers`; `presets` names configs.
"""
