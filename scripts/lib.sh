# shellcheck shell=bash
# Shared by ./test, ./demo and scripts/*. Sourced, not run. Needs bash.

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Where fetched servers and tools live; tests/src/lib.rs documents the layout.
cache_dir() {
    if [[ -n ${WALSHIP_CACHE:-} ]]; then
        printf '%s\n' "$WALSHIP_CACHE"
    else
        printf '%s/walship-test\n' "${XDG_CACHE_HOME:-$HOME/.cache}"
    fi
}

has_apt() { command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; }

# Whether the distribution has this package (installed or not).
apt_offers() {
    local candidate
    candidate=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: //p')
    [[ -n $candidate && $candidate != '(none)' ]]
}

has_server() {
    local cache
    cache=$(cache_dir)
    [[ -x $cache/postgresql/$1/server/bin/postgres || -x /usr/lib/postgresql/$1/bin/postgres ]]
}

# The major that most tests run on: 15 where the distribution has it, else the distribution's own.
primary_major() {
    if [[ -x /usr/lib/postgresql/15/bin/postgres ]] || { has_apt && apt_offers postgresql-15; }; then
        echo 15
        return
    fi
    local major
    for major in 18 17 16 14; do
        if [[ -x /usr/lib/postgresql/$major/bin/postgres ]]; then
            echo "$major"
            return
        fi
    done
    major=$(LC_ALL=C apt-cache depends postgresql 2>/dev/null | sed -n 's/^ *Depends: postgresql-\([0-9]*\)$/\1/p' | head -n 1)
    case $major in
        1[4-8]) echo "$major" ;;
        *) echo 18 ;; # fetched, see install-test-deps
    esac
}

# The newer one that every run tests as well.
newer_major() {
    if [[ $1 == 18 ]]; then echo 17; else echo 18; fi
}

# Runs a command as root.
as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root and there is no sudo; run as root: $*"
    fi
}

# Puts cargo on the PATH, or says where it comes from.
need_rust() {
    if ! command -v cargo >/dev/null && [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]]; then
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
        export PATH
    fi
    command -v cargo >/dev/null || die "Rust is not installed: install rustup and run this again"
}

# The formatter and the linter, which a minimal Rust installation lacks.
need_lints() {
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || die "cargo fmt and cargo clippy are needed (or --no-lint)"
        say "This installs what is missing on this machine: rustfmt and clippy, by rustup"
        rustup component add rustfmt clippy >&2
    fi
}
