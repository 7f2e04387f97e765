"""Compile caches: what a bake is bound to, baking and proving."""
