//! The controller inside quinn, over loopback.

use std::net::Ipv4Addr;
use std::sync::Arc;

use openpi_flash_congestion::BurstConfig;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, ServerConfig, TransportConfig};

const REQUEST: usize = 452_000;

#[tokio::test(flavor = "multi_thread")]
async fn bursts_pass_and_raise_the_window() {
    let key = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let certificate = key.cert.der().clone();
    let mut transport = TransportConfig::default();
    transport.congestion_controller_factory(Arc::new(BurstConfig::default()));
    let transport = Arc::new(transport);

    let private_key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let mut server = ServerConfig::with_single_cert(vec![certificate.clone()], private_key.into()).unwrap();
    server.transport_config(transport.clone());
    let server = Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = server.local_addr().unwrap();
    let served = tokio::spawn(async move {
        let connection = server.accept().await.unwrap().await.unwrap();
        while let Ok((mut send, mut receive)) = connection.accept_bi().await {
            let request = receive.read_to_end(REQUEST).await.unwrap();
            send.write_all(&request.len().to_be_bytes()).await.unwrap();
            send.finish().unwrap();
        }
    });

    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    client.transport_config(transport);
    let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let connection = endpoint.connect_with(client, address, "localhost").unwrap().await.unwrap();
    for _ in 0..20 {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&vec![7; REQUEST]).await.unwrap();
        send.finish().unwrap();
        assert_eq!(receive.read_to_end(8).await.unwrap(), REQUEST.to_be_bytes());
    }
    // The window has left its initial value, so the acknowledgements reach the controller.
    assert_ne!(connection.stats().path.cwnd, BurstConfig::default().initial_window);
    connection.close(0u32.into(), b"");
    served.await.unwrap();
}
