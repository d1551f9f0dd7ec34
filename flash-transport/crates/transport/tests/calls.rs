//! Calls through client, edge and gateway: what they carry, and how they end.

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use common::{HOLD, REFUSE, World, body};
use openpi_flash_client::{Call, Client, Code, Error, Method};
use openpi_flash_wire::envelope::session_prefix;
use tokio::task::JoinSet;

fn timeout(milliseconds: u64) -> Call {
    Call { timeout: Some(Duration::from_millis(milliseconds)), ..Call::default() }
}

#[tokio::test]
async fn an_answer_holds_what_was_sent() {
    let world = World::new().await;
    let client = world.client().await;
    for length in [0, 1, 1200, 70_000, 452_000, 3_000_000] {
        let sent = body(length);
        let answer = client.infer(sent.clone(), Call::default()).await.unwrap();
        let prefix = session_prefix(client.session());
        assert_eq!(answer.body, [prefix, sent].concat());
    }
    assert!(world.metrics.text().contains(r#"requests_total{slot="action",method="Infer",code="OK"} 6"#));
}

#[tokio::test]
async fn a_body_of_the_largest_size_passes_and_a_larger_one_is_refused() {
    let world = World::with(|settings| settings.limits.body_bytes = 100_000).await;
    let client = world.client().await;
    let fits = body(99_000);
    client.infer(fits, Call::default()).await.unwrap();
    let error = client.infer(body(100_001), Call::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.to_string().contains("at most 100000"), "{error}");
    client.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn sixty_four_calls_at_once_get_their_own_answers() {
    let world = World::new().await;
    let client = world.client().await;
    let mut calls = JoinSet::new();
    for index in 0..64 {
        let client = client.clone();
        calls.spawn(async move {
            let sent = body(20_000 + index);
            let answer = client.infer(sent.clone(), Call::default()).await.unwrap();
            assert!(answer.body.ends_with(&sent));
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
}

#[tokio::test]
async fn a_refusal_keeps_its_code_and_field_and_the_connection() {
    let world = World::new().await;
    let client = world.client().await;
    let error = client.infer(Bytes::from_static(REFUSE), Call::default()).await.unwrap_err();
    let Error::Refused(refusal) = &error else { panic!("{error}") };
    assert_eq!((refusal.code, &*refusal.message), (Code::InvalidArgument, "no such camera"));
    assert_eq!(error.field(), "images/a");
    client.infer(body(10), Call::default()).await.unwrap();
    let accepted = r#"handshakes_total{slot="action",result="accepted"} 1"#;
    assert!(world.metrics.text().contains(accepted), "{}", world.metrics.text());
}

#[tokio::test]
async fn a_call_that_is_given_up_ends_the_gateways_work() {
    let world = World::new().await;
    let client = world.client().await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.infer(Bytes::from_static(HOLD), Call::default()).await }
    });
    world.gateway.wait_started(1).await;
    call.abort();
    world.gateway.wait(|gateway| gateway.dropped.load(Ordering::SeqCst) == 1).await;
    client.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn a_deadline_ends_the_call_at_both_ends() {
    let world = World::new().await;
    let client = world.client().await;
    let error = client.infer(Bytes::from_static(HOLD), timeout(100)).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    world.gateway.wait(|gateway| gateway.dropped.load(Ordering::SeqCst) == 1).await;
    let left = world.gateway.contexts.lock().unwrap()[0].timeout.unwrap();
    assert!(left <= Duration::from_millis(100), "{left:?}");
}

#[tokio::test]
async fn trace_and_session_travel_along() {
    let world = World::new().await;
    let client = world.client().await;
    let call = Call {
        session: Some("arm-1".into()),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        tracestate: "a=b".into(),
        timeout: None,
    };
    client.infer(Bytes::new(), call.clone()).await.unwrap();
    client.metadata(call.clone()).await.unwrap();
    for context in &*world.gateway.contexts.lock().unwrap() {
        assert_eq!((&context.traceparent, &context.tracestate), (&call.traceparent, &call.tracestate));
    }
    assert_eq!(world.gateway.bodies.lock().unwrap()[0], (Method::Infer, session_prefix("arm-1")));
}

#[tokio::test]
async fn a_session_is_reset_by_its_name() {
    let world = World::new().await;
    let client = world.client().await;
    client.reset(Call::default()).await.unwrap();
    let expected = (Method::Reset, session_prefix(client.session())); // field 1 of both messages
    assert_eq!(*world.gateway.bodies.lock().unwrap(), [expected]);
}

#[tokio::test]
async fn more_requests_than_the_gateway_takes_are_refused_at_once() {
    let world = World::with(|settings| settings.limits.requests = 1).await;
    let client = world.client().await;
    let held = tokio::spawn({
        let client = client.clone();
        async move { client.infer(Bytes::from_static(HOLD), Call::default()).await }
    });
    world.gateway.wait_started(1).await;
    let error = client.infer(body(10), Call::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    world.gateway.release.notify_waiters();
    held.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_host_with_several_addresses_is_reached_at_the_one_that_answers() {
    let world = World::new().await;
    let mut options = world.options();
    options.host = "localhost".into(); // ::1, where nobody listens, comes first on most machines
    let client = Client::connect(options).await.unwrap();
    client.infer(body(10), Call::default()).await.unwrap();
}

#[tokio::test]
async fn a_closed_client_says_so() {
    let world = World::new().await;
    let client = world.client().await;
    client.close().await;
    let error = client.infer(body(10), Call::default()).await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
    assert_eq!(error.code(), Code::Cancelled);
}
