"""Causal language models in spellings that no architecture of transformers uses, and the parts that they are made of.

Each part says what a reader of its source would count; ``models.MODELS`` puts parts together in twenty ways by hand, and the tests put
them together at random.
"""
