//! Against the bytes that a running openGauss 5.0.0 sent (recorded), and against what nobody should send.

use super::frame::{self, Frame};
use super::sha256::{Asked, Problem};
use super::stream::PreAuthenticated;
use super::*;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, DuplexStream};

/// The question to user `og` by protocol 3.0, and by 3.51.
const QUESTION_3_0: &str = "5dc1f3869ff199847cf3b013a8992257f4d7007e6e09d639ebc426ca8a42b91996e01b1e64baf8c97cba52910d916a\
     48af559ae7f4fa1d696069b49ca16aad24ad9363c3";
const QUESTION_3_51: &str =
    "5dc1f3869ff199847cf3b013a8992257f4d7007e6e09d639ebc426ca8a42b9192b326207";

fn question(text: &str, rounds: Option<u32>) -> Frame {
    let mut body = vec![0, 0, 0, 10, 0, 0, 0, 2];
    body.extend_from_slice(text.as_bytes());
    body.extend(rounds.into_iter().flat_map(u32::to_be_bytes));
    Frame { kind: b'R', body }
}

fn asked(body: &[u8]) -> Option<Result<Asked, Problem>> {
    Asked::of(&Frame {
        kind: b'R',
        body: body.to_vec(),
    })
}

fn options() -> ConnectOptions {
    ConnectOptions {
        user: "og".to_owned(),
        password: Some(crate::Password::new("not the password")),
        ..ConnectOptions::default()
    }
}

#[test]
fn recorded_questions_are_understood() {
    let old = question(QUESTION_3_0, None);
    assert_eq!(old.bytes().len(), 1 + 148);
    let old = Asked::of(&old).unwrap().unwrap();
    // It knows another password than this one, and nothing is sent to it.
    assert_eq!(old.answer(b"not the password", USUAL_ROUNDS), None);
    let new = question(QUESTION_3_51, Some(10_000));
    assert_eq!(new.bytes().len(), 1 + 88);
    let new = Asked::of(&new).unwrap().unwrap();
    assert_eq!(new.answer(b"not the password", 1).unwrap().len(), 64);
}

#[test]
fn what_postgresql_asks_is_left_to_tokio_postgres() {
    for body in [
        &[0, 0, 0, 0][..],
        &[0, 0, 0, 3],
        b"\0\0\0\x05salt",
        b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0",
        b"\0\0\0\x0a\0",
        b"\0\0",
        b"",
    ] {
        assert_eq!(asked(body), None, "{body:?}");
    }
    let error = Frame {
        kind: b'E',
        body: vec![0, 0, 0, 10, 0, 0, 0, 2],
    };
    assert_eq!(Asked::of(&error), None);
}

#[test]
fn other_methods_of_opengauss_are_named() {
    for code in [11, 12, 13, 14] {
        let problem = asked(&[0, 0, 0, code]).unwrap().unwrap_err();
        assert!(matches!(problem, Problem::Unsupported(_)), "{problem:?}");
    }
    let stored_as_md5 = asked(b"\0\0\0\x0a\0\0\0\x01salt").unwrap().unwrap_err();
    assert!(matches!(stored_as_md5, Problem::Unsupported(_)));
}

#[test]
fn questions_that_are_cut_or_bent_are_refused() {
    for whole in [
        question(QUESTION_3_0, None).body,
        question(QUESTION_3_51, Some(10_000)).body,
    ] {
        for cut in 9..whole.len() {
            // 8 bytes shorter than a signature is no other form; cut where the rounds begin it is.
            let outcome = asked(&whole[..cut]).unwrap();
            assert!(outcome.is_err(), "{cut} of {}", whole.len());
        }
        let mut bent = whole.clone();
        bent[20] = b'x';
        assert!(matches!(asked(&bent), Some(Err(Problem::Damaged(_)))));
    }
    for rounds in [0, 10_000_001, u32::MAX] {
        let bad = question(QUESTION_3_51, Some(rounds));
        assert!(matches!(Asked::of(&bad), Some(Err(Problem::Damaged(_)))));
    }
}

/// What a server that says `says` makes of our greeting, and what it was sent.
async fn greeted(says: &[u8]) -> (Result<Greeted<DuplexStream>, SqlError>, Vec<u8>) {
    let (ours, mut theirs) = tokio::io::duplex(256 * 1024);
    theirs.write_all(says).await.unwrap();
    theirs.shutdown().await.unwrap();
    let outcome = greet(ours, &options(), COMMON).await;
    let mut sent = Vec::new();
    if outcome.is_err() || matches!(outcome, Ok(Greeted::AskAgain)) {
        theirs.read_to_end(&mut sent).await.unwrap();
    }
    (outcome, sent)
}

#[tokio::test]
async fn servers_that_are_none_are_refused_and_told_nothing() {
    let oversized = [&b"R"[..], &0x7fff_ffff_u32.to_be_bytes(), b"\0\0\0\x0a"].concat();
    let short = [&b"R"[..], &3_u32.to_be_bytes()].concat();
    for says in [
        &b"HTTP/1.1 400 Bad Request\r\n"[..],
        b"",
        b"R",
        &oversized,
        &short,
    ] {
        let (outcome, sent) = greeted(says).await;
        let Err(SqlError::Unreachable { message, .. }) = outcome else {
            panic!("{says:?} was taken for a server");
        };
        assert!(!message.is_empty());
        assert_eq!(sent, frame::start_up(COMMON, &options()).unwrap());
    }
}

#[tokio::test]
async fn a_server_that_does_not_know_the_password_gets_no_answer() {
    let (outcome, sent) = greeted(&question(QUESTION_3_0, None).bytes()).await;
    assert!(matches!(outcome, Ok(Greeted::AskAgain)));
    assert_eq!(sent, frame::start_up(COMMON, &options()).unwrap());
}

#[tokio::test]
async fn the_start_up_message_is_swallowed_however_it_comes() {
    let start_up = frame::start_up(COMMON, &options()).unwrap();
    for step in [1, 2, 3, 4, 5, 7, start_up.len(), start_up.len() + 3] {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let mut stream = PreAuthenticated::new(ours, b"what it said".to_vec());
        let sent = [&start_up[..], b"Q and so on"].concat();
        for part in sent.chunks(step) {
            stream.write_all(part).await.unwrap();
        }
        theirs.write_all(b", and more").await.unwrap();
        theirs.shutdown().await.unwrap();
        let mut read = String::new();
        stream.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "what it said, and more");
        drop(stream);
        let mut arrived = String::new();
        theirs.read_to_string(&mut arrived).await.unwrap();
        assert_eq!(arrived, "Q and so on", "in pieces of {step}");
    }
}

proptest! {
    #[test]
    fn no_question_makes_it_panic(kind in prop::sample::select(&b"REN"[..]), code in 0_u8..16, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let body = [&[0, 0, 0, code][..], &body].concat();
        if let Some(Ok(asked)) = Asked::of(&(Frame { kind, body })) {
            // Few rounds: what a server may ask for is bounded, and not to be waited for here.
            let _ = format!("{asked:?}");
        }
    }

    #[test]
    fn no_server_makes_it_panic(says in prop::collection::vec(any::<u8>(), 0..64)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let _ = greeted(&says).await;
            let _ = greeted(&[&b"R"[..], &says].concat()).await;
            let _ = greeted(&[&b"R\0\0\0\x20\0\0\0\x0a"[..], &says].concat()).await;
        });
    }
}
