"""Students: what is asked for is made to fit the corpus, built, checked and written with its tokenizer."""
