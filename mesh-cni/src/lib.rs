//! The chained CNI plugin: a Pod of the mesh starts only once its node's agent has enrolled it. It knows neither eBPF nor policy:
//! it asks the agent over a Unix socket, and where no agent answers decides by a list of namespaces that the agent has written.
//!
//! `plugin` decides (pure); `agent` asks; `protocol` is what agent and plugin say to each other; `conflist` puts the plugin into a
//! network configuration and takes it out again (pure).

pub mod agent;
pub mod conflist;
pub mod plugin;
pub mod protocol;
