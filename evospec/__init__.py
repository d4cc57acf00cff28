"""EvoSpec: an LLM server whose speculative decoding evolves while it serves.

The packages lie at the top of the repository; here are links to them, so that they are imported as ``evospec.server``,
``evospec.engine`` and so on, in a checkout as when installed, and hide no other package of these names.
"""
