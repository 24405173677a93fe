# Sourced: lets $python import the project and what it needs, where it is not installed. Wheels of the folder $WHEELS
# are unpacked into $out/wheels first.
export PYTHONSAFEPATH=1 # the current folder's arat_fast would hide the package: kernels/ and loaders/ lie beside it
if [ -n "${WHEELS:-}" ]; then
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$out/wheels" || exit 2
    done
    export PYTHONPATH="$out/wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
if ! "$python" -c 'import arat_fast.kernels.dispatch' 2>/dev/null; then
    # Not installed: lay the package out as an installation would, by links.
    mkdir -p "$out/package/arat_fast"
    for part in "$PWD"/arat_fast/* "$PWD/kernels" "$PWD/loaders"; do
        ln -sfn "$part" "$out/package/arat_fast/$(basename "$part")"
    done
    export PYTHONPATH="$out/package${PYTHONPATH:+:$PYTHONPATH}"
fi
