"""Makes one video of each shape in one process, and prints which keys are in the compile cache."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ltx2_pool.recipe import Recipe
from ltx2_pool.requests import Job
from ltx2_pool.shapes import CacheDirs, Shape

model, root, *keys = sys.argv[1:]
recipe, cache = Recipe(model_path=model), CacheDirs(Path(root))
os.environ.update(recipe.environment(cache))

from ltx2_pool import engine  # noqa: E402

generator = engine.build_generator(recipe)
for key in keys:
    generator.generate(Job("probe", Shape.parse(key), "a fox", 42, 2, 1.0, 24))
print(
    json.dumps(
        {
            "graph_keys": sorted(p.name for p in (cache.torchinductor / "fxgraph").glob("*/*")),
            "autograd_keys": sorted(p.name for p in (cache.torchinductor / "aotautograd").glob("*")),
            "misses": engine.compiled_so_far().misses,
        }
    )
)
