//! What the two ends of a tunnel have proven to one another, and whether it still counts.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;

use crate::identity::Identity;
use crate::identity::store::CertifiedKeyPair;
use crate::identity::trust::TrustBundle;
use crate::state::{Settings, State};
use crate::tls::TlsPeer;

/// Why a proof counts no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The service account of one of both ends was deleted.
    Revoked,
    /// A root that one of both chains depends on is trusted no longer.
    RootRemoved,
}

/// Of one tunnel; what it carries relies on it.
#[derive(Debug)]
pub(super) struct Proof {
    own: (Identity, Vec<CertificateDer<'static>>),
    peer: (Identity, Vec<CertificateDer<'static>>),
    peer_ip: IpAddr,
    /// Verifying costs two signatures: once for all connections of the tunnel.
    verified: Mutex<Option<(Arc<TrustBundle>, bool)>>,
}

impl Proof {
    pub(super) fn new(own: &CertifiedKeyPair, peer: &TlsPeer, peer_ip: IpAddr) -> Arc<Self> {
        Arc::new(Self {
            own: (own.identity.clone(), own.chain.clone()),
            peer: (peer.identity.clone(), peer.chain.clone()),
            peer_ip,
            verified: Mutex::new(None),
        })
    }

    pub(super) fn broken_by(&self, settings: &Settings) -> Option<Broken> {
        if [&self.own, &self.peer]
            .iter()
            .any(|(identity, _)| settings.revoked.contains(identity))
        {
            return Some(Broken::Revoked);
        }
        let bundle = settings.trust_bundle.as_ref()?;
        (!self.holds_under(bundle)).then_some(Broken::RootRemoved)
    }

    fn holds_under(&self, bundle: &Arc<TrustBundle>) -> bool {
        let mut verified = self.verified.lock();
        if let Some((by, holds)) = &*verified
            && by == bundle
        {
            return *holds;
        }
        let now = SystemTime::now();
        let holds = bundle.vouches_for(&self.own.1, now) && bundle.vouches_for(&self.peer.1, now);
        *verified = Some((bundle.clone(), holds));
        holds
    }

    /// Whether discovery, once it has told everything, still knows the peer at its address.
    pub(super) fn peer_is_there(&self, state: &State) -> bool {
        !state.is_synced()
            || state
                .by_address(self.peer_ip)
                .is_some_and(|holder| holder.identity == self.peer.0)
    }
}
