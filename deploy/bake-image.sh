#!/bin/sh
# Builds the image, bakes every shape of shapes.yaml in it on this host's GPU, proves the caches, and adds them to it.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: deploy/bake-image.sh MODEL_DIR IMAGE:TAG     (needs a container engine with a GPU)" >&2
    exit 2
fi
model=$(realpath "$1")
image=$2
cd "$(dirname "$0")/.."
engine=${ENGINE:-docker}

in_image() {
    "$engine" run --rm --gpus 1 --shm-size 8g --user "$(id -u):$(id -g)" --env HOME=/tmp \
        --volume "$PWD/baked:/cache" --volume "$model:/model:ro" "$image-runtime" "$@"
}

"$engine" build --target runtime --tag "$image-runtime" .
mkdir -p baked
in_image ltx2-worker doctor
in_image ltx2-warmup
in_image ltx2-warmup --verify
"$engine" build --build-arg IMAGE_SHAPE_HASH="$(cat baked/IMAGE_SHAPE_HASH)" --tag "$image" .
echo "$image serves menu $(cat baked/IMAGE_SHAPE_HASH)"
