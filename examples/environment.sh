# Sourced by the project's scripts: a virtual environment in .venv with quantcli and what is asked for.
# Usage: ensure_environment EXTRAS [PACKAGE_WITHOUT_ITS_DEPENDENCIES]...
# Quick the second time: nothing is installed while pyproject.toml and the request stay the same.

ensure_environment() {
    local extras=$1
    shift
    local stamp=.venv/quantcli-"$extras".stamp
    local wanted
    wanted=$({ cat pyproject.toml; echo "$extras" "$@"; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Python 3.11 or newer is needed; set PYTHON to one." >&2
        return 1
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing quantcli[$extras] into .venv (a few minutes the first time)" >&2
    # This exact version is the CPU build; an open range would fetch gigabytes of CUDA.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    # "compat" keeps start-up fast: the default editable install adds an import hook.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --config-settings editable_mode=compat --editable ".[$extras]"
    local package
    for package in "$@"; do
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$package"
    done
    echo "$wanted" >"$stamp"
}
