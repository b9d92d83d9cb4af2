#!/bin/sh
# The linker that cargo calls: `cc`, installed first where a fresh Debian machine has none.
if ! command -v cc >/dev/null 2>&1; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "culvert: no C compiler (cc) was found, and Rust needs one to link; on Debian: apt-get install gcc libc6-dev" >&2
    exit 1
  fi
  # Several links may start at once; the lock lets one of them install.
  exec 9>/run/culvert-cc.lock
  flock 9
  if ! command -v cc >/dev/null 2>&1; then
    echo "culvert: installing gcc and libc6-dev (Rust links with them)" >&2
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends gcc libc6-dev; } >&2 || exit 1
  fi
  exec 9>&-
fi
exec cc "$@"
