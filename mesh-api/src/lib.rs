//! The mesh's own Kubernetes types.
