//! What the Secret of the root of trust says, and what each step of a root's replacement makes of it. Pure.
//!
//! `tls.crt`, `tls.key` and `ca.crt` are as cert-manager writes them: the certificate that signs and what leads from it to a root; its
//! key; the roots. Two keys more are this program's: `trusted-roots.pem`, which is trusted beside `ca.crt`, and `next-root.pem`, key and
//! certificate of the root that is to sign next.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::authority::{self, Authority, NewRoot, SignerError};
use crate::limits::{MAX_PEM_BYTES, MAX_TRUSTED_ROOTS};
use crate::roots::{InForce, Step, authorities};

#[cfg(test)]
mod tests;

pub type Data = BTreeMap<String, ByteString>;

pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
pub const ROOTS: &str = "ca.crt";
pub const TRUSTED: &str = "trusted-roots.pem";
pub const NEXT: &str = "next-root.pem";

/// What is wrong, and with which of the Secret's keys. Says nothing of a private key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {key}: {problem}")]
pub struct RootError {
    pub key: &'static str,
    pub problem: String,
}

fn bad(key: &'static str, problem: impl ToString) -> RootError {
    RootError {
        key,
        problem: problem.to_string(),
    }
}

/// # Errors
/// Which key has to be mended.
pub fn read(data: &Data, now: OffsetDateTime) -> Result<InForce, RootError> {
    let chain = certificates(data, CERTIFICATE)?;
    let roots = certificates(data, ROOTS)?;
    let authority = Authority::from_parts(value(data, KEY)?, chain, &roots, now).map_err(|error| match error {
        SignerError::Key(problem) => bad(KEY, problem),
        SignerError::Chain(problem) => bad(CERTIFICATE, problem),
        SignerError::Roots(problem) => bad(ROOTS, problem),
    })?;
    let mut trusted = roots;
    if data.contains_key(TRUSTED) {
        trusted.extend(certificates(data, TRUSTED)?);
    }
    InForce::new(authority, &trusted).map_err(|problem| bad(TRUSTED, problem))
}

fn value<'a>(data: &'a Data, key: &'static str) -> Result<&'a [u8], RootError> {
    let value = data.get(key).ok_or_else(|| bad(key, "is missing"))?;
    if value.0.len() as u64 > MAX_PEM_BYTES {
        return Err(bad(key, format!("is larger than {MAX_PEM_BYTES} bytes")));
    }
    Ok(&value.0)
}

fn certificates(data: &Data, key: &'static str) -> Result<Vec<CertificateDer<'static>>, RootError> {
    authorities(value(data, key)?).map_err(|problem| bad(key, problem))
}

/// A new root's Secret.
///
/// # Errors
/// There is no randomness.
pub fn made(trust_domain: &str, now: OffsetDateTime) -> Result<Data, RootError> {
    let mut data = Data::new();
    sign_with(&mut data, &new_root(trust_domain, now)?);
    Ok(data)
}

fn new_root(trust_domain: &str, now: OffsetDateTime) -> Result<NewRoot, RootError> {
    authority::new_root(trust_domain, now).map_err(|error| bad(KEY, error))
}

fn sign_with(data: &mut Data, root: &NewRoot) {
    put(data, KEY, &root.key_pem);
    put(data, CERTIFICATE, &root.certificate_pem);
    put(data, ROOTS, &root.certificate_pem);
}

fn put(data: &mut Data, key: &str, text: &str) {
    data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
}

/// One step of a root's replacement; returns what an operator should know.
///
/// # Errors
/// The steps before it are missing, or the Secret cannot be read.
pub fn rotate(data: &mut Data, step: Step, trust_domain: &str, now: OffsetDateTime) -> Result<String, RootError> {
    let current = read(data, now)?;
    match (step, data.get(NEXT).cloned()) {
        (Step::Prepare, Some(_)) => Err(bad(NEXT, "a next root is there already; activate it")),
        (Step::Prepare, None) => {
            if current.bundle.len() >= MAX_TRUSTED_ROOTS {
                return Err(bad(
                    TRUSTED,
                    format!(
                        "{MAX_TRUSTED_ROOTS} roots are trusted already, which is the most; retire those that do not sign first"
                    ),
                ));
            }
            let next = new_root(trust_domain, now)?;
            put(data, TRUSTED, &(current.bundle.concat() + &next.certificate_pem));
            put(data, NEXT, &next.pem());
            Ok(format!(
                "the next root, SHA-256 {}, is trusted; activate it once every agent has heard of it: `trusted_roots` of its config_dump",
                sha256(&next.pem(), now)?
            ))
        }
        (Step::Activate, None) => Err(bad(NEXT, "there is no next root; prepare one")),
        (Step::Activate, Some(next)) => {
            let text = String::from_utf8(next.0).map_err(|_| bad(NEXT, "is no text"))?;
            let sha256 = sha256(&text, now)?;
            let (key_pem, certificate_pem) = text
                .split_once("-----BEGIN CERTIFICATE-----")
                .map(|(key, rest)| (key.to_owned(), format!("-----BEGIN CERTIFICATE-----{rest}")))
                .ok_or_else(|| bad(NEXT, "no certificate after the key"))?;
            put(data, TRUSTED, &(current.bundle.concat() + &certificate_pem));
            sign_with(
                data,
                &NewRoot {
                    key_pem,
                    certificate_pem,
                },
            );
            data.remove(NEXT);
            read(data, now)?;
            Ok(format!(
                "the root with SHA-256 {sha256} signs; retire the former one once every certificate was renewed, which takes half of its lifetime"
            ))
        }
        (Step::Retire, Some(_)) => Err(bad(NEXT, "a next root is there; activate it first")),
        (Step::Retire, None) => {
            data.remove(TRUSTED);
            Ok(format!(
                "only the root with SHA-256 {} is trusted",
                current.authority.root_sha256()
            ))
        }
    }
}

fn sha256(next: &str, now: OffsetDateTime) -> Result<String, RootError> {
    Authority::from_pem(next.as_bytes(), now)
        .map(|next| next.root_sha256())
        .map_err(|problem| bad(NEXT, problem))
}
