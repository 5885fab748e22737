# Sourced by tools/demo, tools/test, tools/arm and .ci/run: a virtual environment with what they need, made once.
# Not for direct use. EDGE_VENV names another place than .venv; PYTHON another interpreter than python3.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${EDGE_VENV:-$PWD/.venv}
PYTHON=${PYTHON:-python3}

say() { printf '%s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 && return
    as_root apt-get update -qq >/dev/null 2>&1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1
}

# The torch that runs on this machine without a GPU's libraries: docs/operations.md says why these versions.
torch_requirement() {
    case "$(uname -m)" in
        aarch64) echo "torch==2.9.1" ;;
        *) echo "torch==2.13.0" ;;
    esac
}

# ensure_env EXTRA: the virtual environment with edge-runtime[EXTRA] from this checkout; base: without an extra and without torch.
ensure_env() {
    local extra=$1 stamp
    local -a wanted=("$(torch_requirement)" -e ".[$extra]")
    [ "$extra" != base ] || wanted=("setuptools>=77" -e .)
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || {
        say "Python 3.10 to 3.13 is needed; $PYTHON is $("$PYTHON" --version 2>&1 || echo missing). Set PYTHON to another one."
        exit 2
    }
    stamp="$extra $(cat setup.cfg setup.py pyproject.toml tools/env.sh | sha256sum | cut -c1-16) $("$PYTHON" --version)"
    if [ ! -x "$VENV/bin/python" ]; then
        say "making a virtual environment in $VENV"
        "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 || {
            rm -rf "$VENV"
            apt_install python3-venv && "$PYTHON" -m venv "$VENV"
        } || { say "cannot make a virtual environment: apt-get install python3-venv"; exit 2; }
    fi
    if ! grep -qxF "$stamp" "$VENV/edge-installed" 2>/dev/null; then
        say "installing ${wanted[*]} (some minutes the first time)"
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check "${wanted[@]}" || exit 2
        printf '%s\n' "$stamp" >>"$VENV/edge-installed"
    fi
    export PATH="$VENV/bin:$PATH"
}
