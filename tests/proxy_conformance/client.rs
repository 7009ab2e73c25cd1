//! The product's own client, against the same proxies.

use std::time::{Duration, Instant};

use agent_sql::proxy::{Clock, Gate, LockReply, ProxyConnection, ProxyOptions, UnlockReply};
use agent_sql::{Password, SqlError};
use tokio_util::sync::CancellationToken;

use crate::farm::{Farm, MOMENT, UNLOCK, ok};

const WAIT: Duration = Duration::from_secs(3);

pub(crate) async fn asks_and_is_answered(farm: &mut Farm) {
    let connection = farm.product(1).await;
    let nodes = connection.compute_nodes(MOMENT).await.unwrap();
    assert_eq!(nodes.len(), 2);
    for node in nodes {
        assert!(
            node.port == farm.port(0) || node.port == farm.port(1),
            "{node:?}"
        );
        assert_eq!(
            (
                node.kind.as_str(),
                node.mode.as_str(),
                node.version.as_str()
            ),
            ("PROXY", "Cluster", "5.5.2")
        );
    }
    let mut nodes = connection.export_storage_nodes(MOMENT).await.unwrap();
    nodes.sort_by_key(|node| node.database.clone());
    let mut units = connection.storage_units("bank", MOMENT).await.unwrap();
    units.sort_by_key(|unit| unit.name.clone());
    assert_eq!((nodes.len(), units.len()), (2, 2));
    for number in 0..2 {
        let (node, unit, port) = (&nodes[number], &units[number], farm.nodes[number].port());
        assert_eq!(
            (node.host.as_str(), node.port, unit.host.as_str(), unit.port),
            ("127.0.0.1", port, "127.0.0.1", port)
        );
        assert_eq!(
            (node.logical_database.as_str(), node.user.as_str()),
            ("bank", "postgres")
        );
        assert_eq!(unit.name, format!("ds_{number}"));
    }
    let metadata = connection.export_metadata(MOMENT).await.unwrap();
    assert!(metadata.json.contains("databaseName: bank") && metadata.csn().is_none());
    assert_eq!(connection.clock(MOMENT).await.unwrap(), Clock::Off);
    let nowhere = connection.storage_units("nosuchdb", MOMENT).await;
    assert!(nowhere.is_err(), "{nowhere:?}");
}

/// Until the gate is as wanted.
async fn gate(connection: &ProxyConnection, open: bool) {
    let begun = Instant::now();
    while (connection.probe(MOMENT).await.unwrap() == Gate::Open) != open {
        assert!(begun.elapsed() < MOMENT, "open is not {open}");
    }
}

pub(crate) async fn takes_and_gives_the_lock(farm: &mut Farm) {
    let (first, second) = (farm.product(0).await, farm.product(1).await);
    assert_eq!(
        first.unlock(WAIT, 2 * MOMENT).await.unwrap(),
        UnlockReply::NotLocked
    );
    assert_eq!(first.lock(WAIT, 2 * MOMENT).await.unwrap(), LockReply::Said);
    gate(&first, false).await;
    gate(&second, false).await;
    for connection in [&first, &second] {
        let again = connection.lock(WAIT, 2 * MOMENT).await.unwrap();
        assert!(matches!(again, LockReply::AlreadyLocked(_)), "{again:?}");
    }
    assert_eq!(
        second.unlock(WAIT, 2 * MOMENT).await.unwrap(),
        UnlockReply::Said
    );
    gate(&first, true).await;
    gate(&second, true).await;
}

pub(crate) async fn is_told_what_is_wrong(farm: &mut Farm) {
    let good = farm.options(0);
    let with = |change: &dyn Fn(&mut ProxyOptions)| {
        let mut options = good.clone();
        change(&mut options);
        options
    };
    let wrong = with(&|options| options.password = Some(Password::new("wrong")));
    let nobody = with(&|options| options.user = "nobody".into());
    let nowhere = with(&|options| options.database = "nosuchdb".into());
    let error = |options: ProxyOptions| async move {
        let outcome = ProxyConnection::connect(&options, CancellationToken::new()).await;
        outcome.map(|_| ()).unwrap_err()
    };
    assert!(matches!(error(wrong).await, SqlError::WrongPassword { .. }));
    // openGauss's log-in proves that the server knows the password before ours is sent: one that knows no such user does not.
    let told = error(nobody).await;
    assert!(
        matches!(
            told,
            SqlError::Refused { .. } | SqlError::WrongPassword { .. }
        ),
        "{told:?}"
    );
    let told = error(nowhere).await;
    assert!(matches!(told, SqlError::Refused { .. }), "{told:?}");
    ok(&mut farm.postgres(0).await, "SHOW COMPUTE NODES").await;
    assert!(
        farm.postgres(0)
            .await
            .query(UNLOCK)
            .await
            .unwrap()
            .error()
            .is_some()
    );
}
