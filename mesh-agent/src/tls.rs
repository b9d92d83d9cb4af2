//! THE LEAD IS WRITING THIS FILE (see NOTE-FROM-LEAD.md at the root of the worktree); do not write it.
