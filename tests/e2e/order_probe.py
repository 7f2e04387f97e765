"""Makes one video of each shape in one process, and counts the look-ups and the keys in the compile cache."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Shape

model, root, *keys = sys.argv[1:]
recipe, cache = Recipe(model_path=model), CacheDirs(Path(root))
os.environ.update(recipe.environment(cache))

from ltx2_pool.model import engine  # noqa: E402

generator = engine.build_generator(recipe)
for key in keys:
    generator.generate(Job("probe", Shape.parse(key), "a fox", 42, 2, 1.0, 24))
found = engine.compiled_so_far()
print(
    json.dumps(
        {
            "graph_keys": len(list((cache.torchinductor / "fxgraph").glob("*/*"))),
            "autograd_keys": len(list((cache.torchinductor / "aotautograd").glob("*"))),
            "hits": found.graph_hits + found.autograd_hits,
            "misses": found.misses,
        }
    )
)
