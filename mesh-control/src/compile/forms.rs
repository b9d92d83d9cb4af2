//! Which form of a policy or of a MeshConfig is in force: the same hash wherever the same is said. Pure.

use std::fmt;
use std::str::FromStr;

use mesh_api::ValidMeshConfig;
use sha2::{Digest as _, Sha256};

use crate::objects::ObjectId;
use crate::proto;

/// 64 bits of SHA-256, 16 hexadecimal digits as text. Of forms, and of nodes' names: what replicas tell each other is full of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortHash(u64);

/// A form of an object.
pub type Form = ShortHash;

impl ShortHash {
    /// Digits of its text.
    pub const DIGITS: usize = 16;

    #[must_use]
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        Self(u64::from_be_bytes(first))
    }
}

impl fmt::Display for ShortHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ShortHash {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

/// `encoded`: as agents are told, which has its name in it.
#[must_use]
pub fn of_policy(encoded: &[u8]) -> Form {
    ShortHash::of(&[b"policy", encoded])
}

#[must_use]
pub fn of_mesh_config(id: &ObjectId, config: &ValidMeshConfig) -> Form {
    ShortHash::of(&[b"mesh config", id.namespace.as_bytes(), &proto::encode_mesh_config(config)])
}
