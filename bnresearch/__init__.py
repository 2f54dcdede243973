"""A laboratory for Batch Normalization in JAX/Flax: a claim about BatchNorm is a program.

``bnresearch.config`` has every option, ``bnresearch.train.run`` trains one config, and
``python -m bnresearch`` is the command line. Nothing is imported here, so that tools which only
read run folders need not wait for jax.
"""
