#!/bin/sh
# Makes sure that everything the C programs need is here: a C compiler, make, and the headers and libraries of
# libjpeg(-turbo), libpng, YAJL 2, Expat and OpenMP.
#
#   dev/install.sh --check    only looks; says what is missing and the one command that installs it; exit status 1
#   dev/install.sh            installs it: with apt when this is Debian or Ubuntu and we are root or sudo asks for no
#                             password; everywhere else it prints the command and stops with exit status 1
#
# A thing counts as present when a program that uses it compiles and links, so libraries that were not installed by
# a package manager are found as well: CC, CPPFLAGS and LDFLAGS are honoured.
set -u

CC=${CC:-cc}
CPPFLAGS=${CPPFLAGS:-}
LDFLAGS=${LDFLAGS:-}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# builds FLAGS LIBS < program: can it be compiled and linked?
builds() {
    cat >"$work/t.c"
    # shellcheck disable=SC2086 # the flags are lists of words
    $CC $CPPFLAGS $1 "$work/t.c" -o "$work/t" $LDFLAGS $2 >"$work/log" 2>&1
}

find_missing() {
    missing=
    if ! echo 'int main(void) { return 0; }' | builds "" ""; then
        missing="compiler jpeg png yajl expat" # nothing can be tried without a compiler: ask for all of it
    else
        builds "" -ljpeg <<END || missing="$missing jpeg"
#include <stdio.h>
#include <jpeglib.h>
int main(void) { struct jpeg_error_mgr manager; return jpeg_std_error(&manager) == 0; }
END
        builds "" -lpng <<END || missing="$missing png"
#include <png.h>
int main(void) { return png_get_libpng_ver(NULL) == 0; }
END
        builds "" -lyajl <<END || missing="$missing yajl"
#include <yajl/yajl_parse.h>
#include <yajl/yajl_tree.h>
int main(void) { yajl_tree_free(0); return yajl_alloc(0, 0, 0) == 0; }
END
        builds "" -lexpat <<END || missing="$missing expat"
#include <expat.h>
int main(void) { return XML_ParserCreate(NULL) == 0; }
END
        builds "-fopenmp" "-fopenmp -pthread -lm" <<END || missing="$missing openmp"
#include <math.h>
#include <omp.h>
int main(int count, char **words) { (void)words; return omp_get_max_threads() + (int)sqrt(count) == 0; }
END
    fi
    command -v make >/dev/null 2>&1 || missing="$missing make"
}

# packages MANAGER: the packages of that manager that bring what is missing
packages() {
    for thing in $missing; do
        case $1:$thing in
        apt:compiler | dnf:compiler) echo gcc ;;
        pacman:compiler) echo gcc ;;
        apt:jpeg) echo libjpeg-dev ;;
        apt:png) echo libpng-dev ;;
        apt:yajl) echo libyajl-dev ;;
        apt:expat) echo libexpat1-dev ;;
        apt:openmp) # gcc brings its own; clang has it in a package that carries its version
            if $CC --version 2>/dev/null | grep -q clang; then
                echo "libomp-$($CC -dumpversion | cut -d. -f1)-dev"
            else
                echo gcc
            fi ;;
        dnf:jpeg) echo libjpeg-turbo-devel ;;
        dnf:png) echo libpng-devel ;;
        dnf:yajl) echo yajl-devel ;;
        dnf:expat) echo expat-devel ;;
        dnf:openmp) echo libgomp ;;
        pacman:jpeg) echo libjpeg-turbo ;;
        pacman:openmp) echo openmp ;;
        brew:compiler) echo gcc ;;
        brew:jpeg) echo jpeg-turbo ;;
        brew:png) echo libpng ;;
        brew:openmp) echo gcc ;; # Apple's clang has no OpenMP: make CC=gcc-N
        *) echo "$thing" ;;
        esac
    done | tr '\n' ' ' | sed 's/ $//'
    # a compiler alone has no C library headers on Debian
    case "$1:$missing" in apt:*compiler*) printf ' libc6-dev' ;; esac
}

apt_command() { echo "apt-get install -y --no-install-recommends $(packages apt)"; }

explain() {
    echo "train_detr needs what is not here:$(for thing in $missing; do printf ' %s' "$thing"; done)"
    echo "This one command installs it:"
    system=$(uname -s)
    if [ "$system" = Darwin ]; then
        echo "    brew install $(packages brew)"
    elif command -v apt-get >/dev/null 2>&1; then
        echo "    sudo $(apt_command)"
    elif command -v dnf >/dev/null 2>&1; then
        echo "    sudo dnf install -y $(packages dnf)"
    elif command -v pacman >/dev/null 2>&1; then
        echo "    sudo pacman -S --needed $(packages pacman)"
    else
        echo "    Debian, Ubuntu: sudo $(apt_command)"
        echo "    Fedora:         sudo dnf install -y $(packages dnf)"
        echo "    Arch:           sudo pacman -S --needed $(packages pacman)"
        echo "    macOS:          brew install $(packages brew)"
    fi
}

find_missing
[ -z "$missing" ] && exit 0

if [ "${1:-}" = --check ]; then
    explain >&2
    echo "(\`make install-deps\` runs it where no password is needed.)" >&2
    exit 1
fi

as_root=
if [ "$(id -u)" != 0 ]; then as_root="sudo -n"; fi
if ! command -v apt-get >/dev/null 2>&1 || ! $as_root true >/dev/null 2>&1; then
    explain >&2
    exit 1
fi

echo "Installing:$(for thing in $missing; do printf ' %s' "$thing"; done)"
install() { # shellcheck disable=SC2046,SC2086 # lists of words
    $as_root env DEBIAN_FRONTEND=noninteractive $(apt_command)
}
if ! install >"$work/apt" 2>&1; then # most often the package lists are absent or old
    echo "Reading the package lists (apt-get update)"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get update >"$work/apt" 2>&1 || cat "$work/apt" >&2
    if ! install >"$work/apt" 2>&1; then
        cat "$work/apt" >&2
        explain >&2
        exit 1
    fi
fi
find_missing
if [ -n "$missing" ]; then
    echo "After the installation this is still missing:$missing" >&2
    [ -s "$work/log" ] && cat "$work/log" >&2
    exit 1
fi
