//! TLS 1.3 as QUIC uses it: certificates, and whom to trust.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use openpi_flash_wire::ALPN;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use ring::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};

/// Sessions that a server remembers for resumption at 0-RTT. Each is used once.
const REMEMBERED_SESSIONS: usize = 4096;

/// TLS that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds something else.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No certificate authority is installed on this machine.
    #[error("this machine has no certificate authorities installed ({0}); name a CA file or a fingerprint")]
    NoSystemRoots(String),
    /// A fingerprint that is none.
    #[error("not a SHA-256 fingerprint, which has 64 hexadecimal digits, perhaps with colons")]
    Fingerprint,
    /// Certificates or keys that rustls refuses.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    /// A client CA that cannot be used.
    #[error(transparent)]
    ClientCa(#[from] rustls::server::VerifierBuilderError),
}

/// A certificate chain with its key.
pub struct Certified {
    /// The end entity's first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The end entity's private key.
    pub key: PrivateKeyDer<'static>,
}

impl Certified {
    /// Reads PEM files.
    pub fn load(chain: &Path, key: &Path) -> Result<Self, TlsError> {
        let problem = |error: rustls::pki_types::pem::Error| file(key, error.to_string());
        Ok(Self { chain: load_certificates(chain)?, key: PrivateKeyDer::from_pem_file(key).map_err(problem)? })
    }

    /// Of the end entity's certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.chain[0])
    }
}

impl Clone for Certified {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Certified").field(&self.fingerprint()).finish()
    }
}

/// SHA-256 of a certificate's DER form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, certificate).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<Self, TlsError> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        let mut bytes = [0; 32];
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(TlsError::Fingerprint);
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| TlsError::Fingerprint)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| TlsError::Fingerprint)?;
        }
        Ok(Self(bytes))
    }
}

/// Which servers a client trusts.
#[derive(Debug, Clone, Default)]
pub enum Trust {
    /// Those with a certificate of an authority that this machine trusts.
    #[default]
    SystemRoots,
    /// Those with a certificate of an authority in this PEM file.
    CaFile(PathBuf),
    /// The one with this certificate, whatever its name and dates.
    Fingerprint(Fingerprint),
    /// Any, which protects from nobody on the way. For tests on one machine.
    InsecureAnyCertificate,
}

/// A client's TLS, resuming at 0-RTT where the server lets it.
pub fn client(trust: &Trust, own: Option<&Certified>) -> Result<QuicClientConfig, TlsError> {
    let provider = crypto();
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match trust {
        Trust::SystemRoots => builder.with_root_certificates(system_roots()?),
        Trust::CaFile(path) => builder.with_root_certificates(roots_of(path)?),
        Trust::Fingerprint(pin) => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Pinned { pin: Some(*pin), algorithms }))
        }
        Trust::InsecureAnyCertificate => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Pinned { pin: None, algorithms }))
        }
    };
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => builder.with_client_auth_cert(own.chain.clone(), own.key.clone_key())?,
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_early_data = true;
    QuicClientConfig::try_from(config).map_err(|_| no_initial_suite())
}

/// A server's TLS. With `client_ca`, a PEM file, clients must have a certificate of it.
pub fn server(own: &Certified, client_ca: Option<&Path>) -> Result<QuicServerConfig, TlsError> {
    let provider = crypto();
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots_of(path)?), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(own.chain.clone(), own.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.max_early_data_size = u32::MAX; // QUIC has its own limits and asks for this value
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(REMEMBERED_SESSIONS);
    QuicServerConfig::try_from(config).map_err(|_| no_initial_suite())
}

/// ring, with AES-128-GCM first: on processors with AES instructions it takes the least time per byte.
fn crypto() -> Arc<CryptoProvider> {
    let mut crypto = provider::default_provider();
    crypto.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(crypto)
}

fn no_initial_suite() -> TlsError {
    TlsError::Rustls(rustls::Error::General("no AES-128-GCM, which QUIC begins with".into()))
}

fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| file(path, error.to_string()))?;
    if certificates.is_empty() { Err(file(path, "no certificate in it".into())) } else { Ok(certificates) }
}

fn roots_of(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let problems: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        return Err(TlsError::NoSystemRoots(problems.join("; ")));
    }
    Ok(roots)
}

fn file(path: &Path, problem: String) -> TlsError {
    TlsError::File { path: path.into(), problem }
}

/// The certificate is another than the pinned one.
struct WrongFingerprint(Fingerprint);

impl std::error::Error for WrongFingerprint {}

impl fmt::Display for WrongFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its fingerprint {} is not the pinned one", self.0)
    }
}

/// rustls shows errors of others in this form.
impl fmt::Debug for WrongFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Trusts one certificate, or, without a pin, any; the peer must have its key all the same.
#[derive(Debug)]
struct Pinned {
    pin: Option<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.pin {
            Some(pin) if pin != Fingerprint::of(end_entity) => {
                let problem = WrongFingerprint(Fingerprint::of(end_entity));
                Err(CertificateError::Other(OtherError(Arc::new(problem))).into())
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_as_it_is_shown() {
        let shown = Fingerprint::of(&CertificateDer::from(vec![1, 2, 3])).to_string();
        assert_eq!(shown, "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81");
        let colons: Vec<_> = shown.as_bytes().chunks(2).map(|pair| String::from_utf8_lossy(pair)).collect();
        for text in [shown.clone(), shown.to_uppercase(), colons.join(":")] {
            assert_eq!(text.parse::<Fingerprint>().unwrap().to_string(), shown);
        }
        for text in ["", "ab", &shown[1..], &format!("{}zz", &shown[2..])] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }
}
