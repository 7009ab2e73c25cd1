//! Log-in, by real clients: psql, tokio-postgres, and the client of the product.

use std::process::Command;
use std::time::Duration;

use agent_sql::proxy::{Gate, LockReply, ProxyConnection, ProxyOptions, ProxyTls, UnlockReply};
use agent_sql::{Password, SqlError};
use support::postgres::Installation;
use support::proxy::{Frontend, ProxyFarm, ProxyFarmOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;

use super::bank::*;

const SOON: Duration = Duration::from_secs(10);

fn farm(frontend: Frontend) -> ProxyFarm {
    ProxyFarm::start(ProxyFarmOptions {
        frontend,
        ..ProxyFarmOptions::default()
    })
}

fn psql(farm: &ProxyFarm, user: &str, password: &str, database: &str) -> String {
    let output = Command::new(Installation::newest().bindir.join("psql"))
        .args(["-X", "-h", "127.0.0.1", "-p", &farm.port(0).to_string()])
        .args(["-U", user, "-d", database, "-c", PROBE])
        .env("PGPASSWORD", password)
        .output()
        .expect("psql can be run");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[tokio::test]
async fn psql_logs_in_and_is_told_what_is_wrong() {
    for frontend in [Frontend::PostgresMd5, Frontend::PostgresCleartext] {
        let farm = farm(frontend);
        assert_eq!(psql(&farm, "root", "root", "postgres"), "SUCCESS\n");
        for (user, password, database, message) in [
            (
                "root",
                "wrong",
                "bank",
                "FATAL:  password authentication failed for user \"root\"",
            ),
            ("nobody", "x", "bank", "FATAL:  unknown username: nobody"),
            (
                "root",
                "root",
                "nosuchdb",
                "FATAL:  database \"nosuchdb\" does not exist",
            ),
        ] {
            let said = psql(&farm, user, password, database);
            assert!(said.contains(message), "{said}");
        }
    }
}

#[tokio::test]
async fn sqlstates_of_refused_log_ins() {
    let farm = farm(Frontend::PostgresMd5);
    let right = config(&farm, 0, "bank");
    let (mut wrong, mut unknown, mut elsewhere) = (right.clone(), right.clone(), right.clone());
    wrong.password("wrong");
    unknown.user("nobody");
    elsewhere.dbname("nosuchdb");
    for (config, state) in [(wrong, "28P01"), (unknown, "28000"), (elsewhere, "3D000")] {
        let Err(error) = config.connect(NoTls).await else {
            panic!("let in");
        };
        assert_eq!(
            error.code().map(tokio_postgres::error::SqlState::code),
            Some(state)
        );
    }
    assert!(right.connect(NoTls).await.is_ok());
}

fn options(farm: &ProxyFarm, password: &str) -> ProxyOptions {
    ProxyOptions {
        port: farm.port(0),
        password: Some(Password::new(password)),
        ..ProxyOptions::default()
    }
}

async fn product(options: &ProxyOptions) -> Result<ProxyConnection, SqlError> {
    ProxyConnection::connect(options, CancellationToken::new()).await
}

#[tokio::test]
async fn the_product_s_client_logs_in_everywhere_and_locks() {
    for frontend in [
        Frontend::PostgresMd5,
        Frontend::PostgresCleartext,
        Frontend::OpenGaussSha256,
    ] {
        let farm = farm(frontend);
        let proxy = product(&options(&farm, "root")).await.unwrap();
        assert_eq!(proxy.probe(SOON).await.unwrap(), Gate::Open);
        let wait = Duration::from_millis(500);
        assert_eq!(proxy.lock(wait, SOON).await.unwrap(), LockReply::Said);
        assert!(matches!(proxy.probe(SOON).await.unwrap(), Gate::Locked(_)));
        assert_eq!(proxy.unlock(wait, SOON).await.unwrap(), UnlockReply::Said);
        assert_eq!(
            proxy.unlock(wait, SOON).await.unwrap(),
            UnlockReply::NotLocked
        );
        let listed = proxy.compute_nodes(SOON).await.unwrap();
        assert_eq!(listed.len(), 2);
        assert_eq!(listed[1].port, farm.port(1));
        let error = product(&options(&farm, "wrong")).await.unwrap_err();
        assert!(matches!(error, SqlError::WrongPassword { .. }), "{error:?}");
    }
}

/// What the openGauss frontend asks, after method and code, by the client's protocol.
async fn asked(farm: &ProxyFarm, protocol: u32) -> usize {
    let mut stream = TcpStream::connect(("127.0.0.1", farm.port(0)))
        .await
        .unwrap();
    let parameters = b"user\0root\0database\0postgres\0\0";
    let length = u32::try_from(8 + parameters.len()).unwrap();
    let start = [
        &length.to_be_bytes()[..],
        &protocol.to_be_bytes(),
        parameters,
    ]
    .concat();
    stream.write_all(&start).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'R');
    let length = stream.read_u32().await.unwrap();
    assert_eq!(stream.read_u32().await.unwrap(), 10);
    assert_eq!(stream.read_u32().await.unwrap(), 2);
    usize::try_from(length).unwrap() - 12
}

#[tokio::test]
async fn opengauss_s_question_depends_on_the_protocol() {
    let farm = farm(Frontend::OpenGaussSha256);
    let common = 64 + 8;
    assert_eq!(asked(&farm, 3 << 16).await, common + 64);
    assert_eq!(asked(&farm, (3 << 16) + 50).await, common);
    assert_eq!(asked(&farm, (3 << 16) + 51).await, common + 4);
}

#[tokio::test]
async fn tls_is_refused_unless_there_is_a_certificate() {
    let plain = farm(Frontend::PostgresMd5);
    let on = |ca: &str| ProxyTls::On {
        ca_pem: Some(ca.as_bytes().to_vec()),
    };
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap().pem();
    let tls = ProxyFarm::start(ProxyFarmOptions {
        tls: Some((certificate.clone(), key.serialize_pem())),
        ..ProxyFarmOptions::default()
    });
    let over = |farm: &ProxyFarm| ProxyOptions {
        tls: on(&certificate),
        ..options(farm, "root")
    };
    let proxy = product(&over(&tls)).await.unwrap();
    assert_eq!(proxy.probe(SOON).await.unwrap(), Gate::Open);
    let error = product(&over(&plain)).await.unwrap_err();
    assert!(matches!(error, SqlError::Setting { .. }), "{error:?}");
}
