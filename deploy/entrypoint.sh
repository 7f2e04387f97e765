#!/bin/sh
# The image's entrypoint: reads the weights into the page cache on four streams, then becomes the command it was given.
# From slow storage the weights process would otherwise read them page by page, on one stream.
set -eu

warm_page_cache() {
    echo "entrypoint: reading the weights in ${LTX2_MODEL} into the page cache (LTX2_WARM_PAGE_CACHE=0 skips it)" >&2
    # A file that cannot be read is the worker's to complain about: it knows whether it needs it.
    find -L "${LTX2_MODEL}" -type f -name '*.safetensors' -print0 |
        xargs -0 -r -n 1 -P 4 sh -c 'cat "$1" > /dev/null && echo "entrypoint: read $1" >&2' sh || true
}

if [ "${LTX2_WARM_PAGE_CACHE:-1}" = 1 ] && [ -d "${LTX2_MODEL:-}" ]; then
    case " $* " in
        *" --help "* | *" --plan "* | *" doctor "* | *" status "*) ;; # these load no weights
        *"ltx2-worker "* | *"ltx2-warmup "*) warm_page_cache ;;
    esac
fi
exec "$@"
