"""Models, weights and layers of other Reformers; each submodule is for one package.

Nothing here is imported by the rest of ``reformer_ext``, and importing a submodule does not import
the package it is for.
"""
