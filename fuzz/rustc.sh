#!/bin/sh
# Cargo's RUSTC_WRAPPER for the fuzz targets: the mesh's own crates get the flags of the instrumentation, everything else is built as
# for the workspace, and shared with it.
rustc=$1
shift
case " $* " in
  *" --crate-name mesh_agent "* | *" --crate-name mesh_api "* | *" --crate-name mesh_control "* | *" --crate-name mesh_proto "* | *" --crate-name planted "*)
    # shellcheck disable=SC2086 # Several flags.
    exec "$rustc" "$@" $CULVERT_FUZZ_FLAGS
    ;;
esac
exec "$rustc" "$@"
