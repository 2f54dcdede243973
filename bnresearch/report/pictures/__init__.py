"""Pictures of a study, decided once and drawn with two pens. Imports no jax.

`design`, `measured`, `curves` and `effects` turn numbers into what is drawn, in the words of
`marks`; `screen` (plotly) and `paper` (matplotlib) draw it.
"""
