//! The two verifiers of the tunnel: any workload of our trust domain as client, one expected workload as server.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::Identity;

/// The URIs among a certificate's subject alternative names, in their order.
fn uris(leaf: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| error.to_string())?
        .ok_or("it has no subject alternative name")?;
    let mut uris = Vec::new();
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            // It may have been the first URI.
            GeneralName::Invalid(..) => return Err("a subject alternative name cannot be read".into()),
            _ => {}
        }
    }
    Ok(uris)
}

/// Whom a certificate stands for: its first URI.
///
/// # Errors
/// There is none, or it is no identity of a workload.
pub fn first_identity(leaf: &CertificateDer<'_>) -> Result<Identity, String> {
    let uris = uris(leaf)?;
    let first = uris.first().ok_or("it has no URI among its names")?;
    Identity::parse(first).map_err(|error| error.to_string())
}

fn rejected(why: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Rejected(why)))))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Rejected(String);

/// Accepts clients whose chain ends at a root and whose identity is of our trust domain.
#[derive(Debug)]
pub(super) struct MeshClients {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
}

impl MeshClients {
    pub(super) fn new(roots: Arc<RootCertStore>, trust_domain: &Arc<str>, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            chain,
            trust_domain: trust_domain.clone(),
        })
    }
}

impl ClientCertVerifier for MeshClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // None: a client has one certificate to offer, and hints would tell strangers who our authority is.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let identity = first_identity(end_entity).map_err(rejected)?;
        if identity.trust_domain == self.trust_domain {
            Ok(verified)
        } else {
            Err(rejected(format!("{identity} is not of trust domain {}", self.trust_domain)))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Accepts the server that is expected, by identity instead of by host name.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    roots: Arc<RootCertStore>,
    expected: Identity,
    provider: Arc<CryptoProvider>,
}

impl ExpectedServer {
    pub(super) fn new(roots: Arc<RootCertStore>, expected: Identity, provider: Arc<CryptoProvider>) -> Self {
        Self {
            roots,
            expected,
            provider,
        }
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        // Checks the extended key usage serverAuth, too.
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let expected = self.expected.to_string();
        let uris = uris(end_entity).map_err(rejected)?;
        if uris.contains(&expected) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rejected(format!("{expected} is expected, found {uris:?}")))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn tls12() -> Error {
    Error::General("TLS 1.2 is not spoken".into())
}
