//! Peers that are not what they should be: each gets a clear error, and nobody else notices.

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::{World, authority, body, tokens};
use futures_util::FutureExt;
use openpi_flash_client::{Call, Certified, Client, Code, Error, Fingerprint, Trust};
use openpi_flash_quic::stream::{read_frame, write_frame};
use openpi_flash_quic::{Tuning, tls};
use openpi_flash_wire::{CloseCode, Hello, Method, Request, Response, encode};
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream, VarInt};

async fn refused(options: openpi_flash_client::Options) -> Error {
    match Client::connect(options.clone()).await {
        Err(error) => error,
        Ok(client) => client.infer(body(10), Call::default()).await.unwrap_err(),
    }
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (world, other) = (World::new().await, World::new().await);
    let mut options = world.options();
    options.trust = Trust::CaFile(other.certificate());
    let error = refused(options.clone()).await;
    assert!(matches!(&error, Error::Untrusted { reason, .. } if reason.contains("certificate")), "{error}");
    options.trust = Trust::SystemRoots;
    let error = refused(options).await;
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let world = World::new().await;
    let mut options = world.options();
    options.server_name = Some("elsewhere.example".into());
    let error = refused(options).await;
    assert!(
        matches!(&error, Error::Untrusted { reason, .. } if reason.contains("NotValidForName")
        || reason.contains("not valid for name")),
        "{error}"
    );
}

#[tokio::test]
async fn a_pinned_fingerprint_admits_one_certificate() {
    let (world, other) = (World::new().await, World::new().await);
    let pin = |world: &World| {
        let key = world.folder.path().join("edge-key.pem");
        Trust::Fingerprint(Certified::load(&world.certificate(), &key).unwrap().fingerprint())
    };
    let mut options = world.options();
    options.server_name = Some("elsewhere.example".into()); // a pin does not look at names
    options.trust = pin(&world);
    Client::connect(options.clone()).await.unwrap().infer(body(10), Call::default()).await.unwrap();
    options.trust = pin(&other);
    let error = refused(options).await;
    assert!(matches!(&error, Error::Untrusted { reason, .. } if reason.contains("fingerprint")), "{error}");
    assert!("12".parse::<Fingerprint>().is_err());
}

#[tokio::test]
async fn a_token_admits_and_another_does_not() {
    let world = World::with(|settings| settings.tokens = Some(tokens("right"))).await;
    let mut options = world.options();
    options.token = "right".into();
    let good = Client::connect(options.clone()).await.unwrap();
    good.infer(body(10), Call::default()).await.unwrap();
    for (token, reason) in [("wrong", "not one that this server accepts"), ("", "asks for a token")] {
        options.token = token.into();
        let error = refused(options.clone()).await;
        assert_eq!(error.code(), Code::Unauthenticated, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    good.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_asks_for_certificates_gets_one() {
    let files = tempfile::tempdir().unwrap();
    let (ca, certified) = authority(files.path());
    let world = World::with(|settings| settings.client_ca = Some(ca)).await;

    let error = refused(world.options()).await;
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
    let mut options = world.options();
    options.certificate = Some(certified);
    Client::connect(options).await.unwrap().infer(body(10), Call::default()).await.unwrap();
}

/// A peer that writes what it likes.
async fn peer(world: &World) -> Connection {
    let config = tls::client(&Trust::CaFile(world.certificate()), None).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(config));
    config.transport_config(Arc::new(Tuning::default().transport()));
    let mut endpoint = Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into()).unwrap();
    endpoint.set_default_client_config(config);
    endpoint.connect(world.address, "127.0.0.1").unwrap().await.unwrap()
}

async fn greeted(world: &World) -> Connection {
    let connection = peer(world).await;
    let mut stream = connection.open_uni().await.unwrap();
    write_frame(&mut stream, &Hello::default(), Bytes::new()).await.unwrap();
    connection
}

fn request(body_length: u32) -> Request {
    Request::new(Method::Infer, body_length)
}

async fn response(mut receive: RecvStream) -> (Code, String) {
    let refusal = read_frame::<Response>(&mut receive, 0).await.unwrap().header.refusal.unwrap();
    (refusal.code, refusal.message)
}

async fn send(connection: &Connection, bytes: &[u8]) -> (SendStream, RecvStream) {
    let (mut send, receive) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    (send, receive)
}

#[tokio::test]
async fn damaged_frames_are_refused_and_the_connection_goes_on() {
    let world = World::new().await;
    let other = world.client().await;
    let connection = greeted(&world).await;
    let good = encode(&request(4)).unwrap();
    let mut wrong_version = BytesMut::from(&good[..]);
    wrong_version[0] = 9;
    for (bytes, expected) in [
        (&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], "version 71"),
        (&wrong_version, "version 9"),
        (&[&good[..], b"abcde"].concat(), "bytes follow"),
        (&encode(&request(u32::MAX)).unwrap(), "body: 4294967295 bytes, at most 67108864"),
    ] {
        let (_send, receive) = send(&connection, bytes).await;
        let (code, message) = response(receive).await;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains(expected), "{message}");
    }
    let (mut half, receive) = send(&connection, &good[..7]).await;
    half.finish().unwrap();
    assert!(response(receive).await.1.contains("ended inside a frame"));

    let (mut whole, mut receive) = send(&connection, &[&good[..], b"\x12\x02ab"].concat()).await;
    whole.finish().unwrap();
    assert!(read_frame::<Response>(&mut receive, 100).await.unwrap().header.refusal.is_none());
    other.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn a_request_that_never_ends_is_refused_in_time() {
    let world = World::with(|settings| settings.timeouts.transfer = Duration::from_millis(200)).await;
    let other = world.client().await;
    let connection = greeted(&world).await;
    let header = encode(&request(1000)).unwrap();
    let (_open, receive) = send(&connection, &[&header[..], b"some of it"].concat()).await;
    let (_silent, silent) = send(&connection, &header[..3]).await;
    for stream in [receive, silent] {
        let (code, message) = response(stream).await;
        assert_eq!((code, &*message), (Code::DeadlineExceeded, "the request did not arrive in time"));
    }
    other.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn bytes_in_flight_have_a_limit_of_their_own() {
    let world = World::with(|settings| settings.limits.connection_bytes = 100_000).await;
    let connection = greeted(&world).await;
    let header = encode(&request(90_000)).unwrap();
    let part = [&header[..], &vec![0; 60_000]].concat();
    let (_first, first) = send(&connection, &part).await;
    let (_second, second) = send(&connection, &part).await;
    let refused = tokio::select! {
        refused = response(first) => refused,
        refused = response(second) => refused,
    };
    assert_eq!(refused, (Code::ResourceExhausted, "too many bytes of requests are in flight".into()));
    world.client().await.infer(body(10), Call::default()).await.unwrap();
}

async fn closed(connection: &Connection) -> (VarInt, String) {
    match connection.closed().await {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code, String::from_utf8_lossy(&close.reason).into_owned())
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_client_that_says_no_hello_is_closed() {
    let world = World::with(|settings| settings.timeouts.handshake = Duration::from_millis(200)).await;
    let silent = peer(&world).await;
    let (code, reason) = closed(&silent).await;
    assert_eq!((code.into_inner(), &*reason), (CloseCode::Limit as u64, "no hello within the time for a handshake"));
    let confused = peer(&world).await;
    let mut stream = confused.open_uni().await.unwrap();
    stream.write_all(b"hello, world").await.unwrap();
    assert_eq!(closed(&confused).await.0.into_inner(), CloseCode::Protocol as u64);
    world.client().await.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn a_mebibyte_has_room_before_the_hello_is_accepted_and_more_after() {
    let world = World::new().await;
    let connection = peer(&world).await;
    let sent = body(1 << 20);
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    // The write ends once all of it may be sent, though no hello was.
    write_frame(&mut send, &request(sent.len() as u32), sent.clone()).await.unwrap();
    let mut early = Vec::new();
    for _ in 0..7 {
        early.push(connection.open_bi().await.unwrap());
    }
    let mut more = Box::pin(connection.open_bi());
    assert!(more.as_mut().now_or_never().is_none());
    let mut hello = connection.open_uni().await.unwrap();
    write_frame(&mut hello, &Hello::default(), Bytes::new()).await.unwrap();
    let answer = read_frame::<Response>(&mut receive, 2 << 20).await.unwrap();
    assert!(answer.body.ends_with(&sent));
    more.await.unwrap();
    let mut open = Vec::new();
    for _ in 0..40 {
        open.push(connection.open_bi().await.unwrap());
    }
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(&encode(&request(4 << 20)).unwrap()).await.unwrap();
    send.write_all(&body(4 << 20)[..4 << 20]).await.unwrap();
}

#[tokio::test]
async fn an_address_has_its_share_of_connections() {
    let world = World::with(|settings| settings.limits.connections_per_address = 2).await;
    let kept = [world.client().await, world.client().await];
    let mut options = world.options();
    options.connect_timeout = Duration::from_millis(300);
    assert_eq!(refused(options).await.code(), Code::Unavailable);
    for client in &kept {
        client.infer(body(10), Call::default()).await.unwrap();
    }
    assert!(world.metrics.text().contains(r#"result="retried""#)); // its address was asked for before it was refused
    kept[0].close().await;
    world.client().await.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn many_handshakes_are_asked_for_their_address_and_still_served() {
    let world = World::with(|settings| settings.limits.handshakes_before_retry = 0).await;
    world.client().await.infer(body(10), Call::default()).await.unwrap();
    assert!(world.metrics.text().contains(r#"handshakes_total{slot="action",result="retried"} 1"#));
}
