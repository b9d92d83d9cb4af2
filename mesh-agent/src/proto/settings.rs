use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_proto::mesh::settings::Mtls as WireMtls;
use mesh_proto::mesh::{Cidr, Settings as WireSettings};
use mesh_proto::{MAX_REVOKED, MAX_TRUSTED_ROOTS};

use super::{DEFAULT_TRUST_DOMAIN, ProtoError, field, network, non_empty};
use crate::identity::Identity;
use crate::identity::trust::TrustBundle;
use crate::state::{Exclusions, Mtls, Settings};

/// Ports, and ranges: a connection is compared with each.
const MAX_EXCLUSIONS: usize = 64;

impl TryFrom<WireSettings> for Settings {
    type Error = ProtoError;

    fn try_from(wire: WireSettings) -> Result<Self, ProtoError> {
        let trust_domain = non_empty(&wire.trust_domain, DEFAULT_TRUST_DOMAIN).to_owned();
        Identity::parse(&format!("spiffe://{trust_domain}/ns/x/sa/x"))
            .map_err(|_| field("trust_domain", "holds characters that no trust domain has"))?;
        for (name, count, most) in [
            ("excluded_ports", wire.excluded_ports.len(), MAX_EXCLUSIONS),
            ("excluded_cidrs", wire.excluded_cidrs.len(), MAX_EXCLUSIONS),
            ("trust_bundle", wire.trust_bundle.len(), MAX_TRUSTED_ROOTS),
            ("revoked_identities", wire.revoked_identities.len(), MAX_REVOKED),
        ] {
            if count > most {
                return Err(field(name, format!("has {count} values, more than {most}")));
            }
        }
        // Who cannot be read cannot be told from others: not taken for nobody.
        let revoked = |uri: &String| Identity::parse(uri).map_err(|error| field("revoked_identities", error.to_string()));
        let bundle = TrustBundle::from_pem(&wire.trust_bundle).map_err(|why| field("trust_bundle", why))?;
        let port = |number: &u32| {
            let port = u16::try_from(*number).ok().filter(|port| *port != 0);
            port.ok_or_else(|| field("excluded_ports", format!("has the port {number}")))
        };
        let mut namespaces = BTreeMap::<Arc<str>, Mtls>::new();
        for of in &wire.namespaces {
            let given = mtls(of.mtls, &of.namespace);
            let held = namespaces.entry(of.namespace.as_str().into()).or_insert(given);
            // Told twice: the safer.
            if given == Mtls::Strict {
                *held = given;
            }
        }
        Ok(Self {
            trust_domain,
            pod_ranges: networks("pod_ranges", &wire.pod_ranges)?,
            mtls: mtls(wire.mtls, "the mesh"),
            namespaces,
            excluded: Exclusions {
                ports: wire.excluded_ports.iter().map(port).collect::<Result<_, _>>()?,
                ranges: networks("excluded_cidrs", &wire.excluded_cidrs)?,
            },
            trust_bundle: (!bundle.is_empty()).then(|| Arc::new(bundle)),
            revoked: wire.revoked_identities.iter().map(revoked).collect::<Result<_, _>>()?,
        })
    }
}

fn networks(name: &'static str, wire: &[Cidr]) -> Result<Vec<IpNet>, ProtoError> {
    wire.iter()
        .map(|cidr| network(&cidr.address, cidr.length).ok_or_else(|| field(name, "has a range that is none")))
        .collect()
}

/// What this agent does not know may be stricter than all it knows.
fn mtls(wire: i32, of: &str) -> Mtls {
    match WireMtls::try_from(wire) {
        Ok(WireMtls::Unspecified | WireMtls::Permissive) => Mtls::Permissive,
        Ok(WireMtls::Strict) => Mtls::Strict,
        Err(_) => {
            tracing::warn!(
                mtls = wire,
                of,
                "the settings ask for a kind of mTLS that this agent does not know: taken for STRICT"
            );
            Mtls::Strict
        }
    }
}
