//! What else is asked, and how it is answered: by names, numbers and kinds of columns.

use support::raw::{Heard, Raw, Reply};

use crate::farm::{Farm, ok, refused};

/// All columns of DistSQL are `"char"` by their number.
fn all_of_type_18(reply: &Reply) {
    let columns = reply.0.iter().find_map(|heard| match heard {
        Heard::Columns(columns) => Some(columns),
        _ => None,
    });
    let columns = columns.expect("columns");
    assert!(columns.iter().all(|(_, kind)| *kind == 18), "{columns:?}");
}

fn texts(row: &[Option<String>]) -> Vec<&str> {
    row.iter()
        .map(|value| value.as_deref().unwrap_or("NULL"))
        .collect()
}

pub(crate) async fn compute_nodes(farm: &mut Farm) {
    for i in 0..2 {
        let reply = ok(&mut farm.postgres(i).await, "SHOW COMPUTE NODES").await;
        let names = [
            "instance_id",
            "instance_type",
            "host",
            "port",
            "status",
            "mode_type",
            "worker_id",
            "labels",
            "version",
            "database_name",
        ];
        assert_eq!(reply.columns(), names);
        all_of_type_18(&reply);
        assert_eq!(reply.tags(), ["SELECT 2"]);
        let mut ports = Vec::new();
        for row in reply.rows() {
            let row = texts(row);
            assert_eq!(
                [row[1], row[4], row[5], row[7], row[8], row[9]],
                ["PROXY", "OK", "Cluster", "", "5.5.2", ""]
            );
            assert_eq!(row[0].len(), 36, "{row:?}");
            ports.push(row[3].parse::<u16>().unwrap());
        }
        ports.sort_unstable();
        let mut expected = [farm.port(0), farm.port(1)];
        expected.sort_unstable();
        assert_eq!(ports, expected);
    }
}

pub(crate) async fn compute_node_info_and_mode(farm: &mut Farm) {
    let mut session = farm.postgres(1).await;
    let reply = ok(&mut session, "SHOW COMPUTE NODE INFO").await;
    let names = [
        "instance_id",
        "host",
        "port",
        "status",
        "mode_type",
        "worker_id",
        "labels",
        "version",
    ];
    assert_eq!(reply.columns(), names);
    let port = farm.port(1).to_string();
    assert_eq!(texts(reply.rows()[0])[2], port);
    let reply = ok(&mut session, "SHOW COMPUTE NODE MODE").await;
    assert_eq!(reply.columns(), ["type", "repository", "props"]);
    assert_eq!(texts(reply.rows()[0])[..2], ["Cluster", "ZooKeeper"]);
}

async fn units(session: &mut Raw, sql: &str) -> Reply {
    let reply = ok(session, sql).await;
    let names = [
        "name",
        "type",
        "host",
        "port",
        "db",
        "connection_timeout_milliseconds",
        "idle_timeout_milliseconds",
        "max_lifetime_milliseconds",
        "max_pool_size",
        "min_pool_size",
        "read_only",
        "other_attributes",
    ];
    assert_eq!(reply.columns(), names);
    reply
}

pub(crate) async fn storage_units(farm: &mut Farm) {
    let (mut bank, mut postgres) = (farm.bank(0).await, farm.postgres(1).await);
    for reply in [
        units(&mut bank, "SHOW STORAGE UNITS").await,
        units(&mut bank, "SHOW STORAGE UNITS FROM bank").await,
        units(&mut postgres, "SHOW STORAGE UNITS FROM bank").await,
        units(&mut postgres, "SHOW STORAGE UNITS FROM `bank`").await,
    ] {
        let mut rows: Vec<_> = reply
            .rows()
            .iter()
            .map(|row| texts(row)[..5].join(" "))
            .collect();
        rows.sort();
        let expected = [0, 1].map(|n| {
            format!(
                "ds_{n} PostgreSQL 127.0.0.1 {} bank_{n}",
                farm.nodes[n].port()
            )
        });
        assert_eq!(rows, expected);
    }
    assert!(
        units(&mut postgres, "SHOW STORAGE UNITS")
            .await
            .rows()
            .is_empty()
    );
    // FATAL, and the session goes on.
    let reply = postgres
        .query("SHOW STORAGE UNITS FROM nosuchdb")
        .await
        .unwrap();
    assert_eq!(reply.error().unwrap().0, "3D000");
    if !farm.is_gauss() {
        assert_eq!(
            reply.error().unwrap().1,
            "database \"nosuchdb\" does not exist"
        );
        assert_eq!(reply.field('S'), Some("FATAL"));
    }
    ok(&mut postgres, "SHOW COMPUTE NODES").await;
}

pub(crate) async fn rules_without_a_clock(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    let reply = ok(&mut session, "SHOW GLOBAL CLOCK RULE").await;
    assert_eq!(reply.columns(), ["type", "provider", "enable", "props"]);
    // As if there were a local one, but for `enable`.
    assert_eq!(texts(reply.rows()[0]), ["TSO", "local", "false", ""]);
    let reply = ok(&mut session, "SHOW TRANSACTION RULE").await;
    assert_eq!(reply.columns(), ["default_type", "provider_type", "props"]);
    assert_eq!(texts(reply.rows()[0]), ["LOCAL", "Atomikos", ""]);
}

pub(crate) async fn databases(farm: &mut Farm) {
    let mut session = farm.bank(0).await;
    let reply = session.query("CREATE DATABASE bank").await.unwrap();
    assert_eq!(
        reply.error(),
        Some(("42P04", "Database 'bank' already exists"))
    );
    assert_eq!(
        (reply.field('S'), reply.ready()),
        (Some("FATAL"), Some('I'))
    );
    let (code, text) = refused(&mut session, "DROP DATABASE nosuchdb").await;
    let bare = "org.apache.shardingsphere.infra.exception.postgresql.exception.PostgreSQLException";
    assert_eq!((code.as_str(), text.as_str()), ("99999", bare));
    let (code, text) = refused(&mut session, "DROP DATABASE bank").await;
    let cause = "Unknown exception.\nMore details: java.lang.UnsupportedOperationException: cannot drop the currently open database";
    assert_eq!((code.as_str(), text.as_str()), ("58000", cause));
    ok(&mut session, "SELECT count(*) FROM account").await;
}

pub(crate) async fn no_storage_unit(farm: &mut Farm) {
    let mut session = farm.postgres(0).await;
    for sql in ["SELECT 1", "SELECT version()", "LOCK NONSENSE"] {
        let (code, text) = refused(&mut session, sql).await;
        assert_eq!(code, "42S02", "{sql}: {text}");
        assert_eq!(text, "There is no storage unit in database 'postgres'.");
    }
}

pub(crate) async fn no_such_table(farm: &mut Farm) {
    let (code, text) = refused(&mut farm.bank(0).await, "SELECT * FROM nosuch").await;
    assert_eq!(
        (code.as_str(), text.as_str()),
        ("42S02", "Table or view 'nosuch' does not exist.")
    );
}

/// Which is why nobody may prepare it.
pub(crate) async fn prepared_dist_sql_fails(farm: &mut Farm) {
    let reply = farm
        .postgres(0)
        .await
        .prepare("SHOW COMPUTE NODES")
        .await
        .unwrap();
    let (code, text) = reply.error().expect("it fails");
    assert_eq!(code, "58000");
    assert!(
        text.ends_with("Can not find aggregated data source"),
        "{text}"
    );
    // In a database with storage units a node is asked.
    let reply = farm
        .bank(0)
        .await
        .prepare("SHOW COMPUTE NODES")
        .await
        .unwrap();
    assert_eq!(
        reply.error(),
        Some(("42601", "syntax error at or near \"NODES\""))
    );
}
