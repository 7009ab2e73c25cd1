//! Transactions over both nodes.

use support::proxy::{ProxyFarm, ProxyFarmOptions, Transaction};

use super::bank::*;

#[tokio::test]
async fn local_commits_and_rolls_back_on_both_nodes() {
    let nodes = Nodes::start(2).await;
    let farm = ProxyFarm::start(nodes.options());
    let client = client(&farm, 0).await;
    run(
        &client,
        "INSERT INTO account VALUES (1, 100), (2, 100), (3, 100)",
    )
    .await;
    for end in ["ROLLBACK", "COMMIT"] {
        run(&client, "BEGIN").await;
        run(
            &client,
            "UPDATE account SET balance = balance - 10 WHERE id = 1",
        )
        .await;
        run(
            &client,
            "UPDATE account SET balance = balance + 10 WHERE id = 2",
        )
        .await;
        assert_eq!(
            nodes
                .ask(0, "SELECT balance FROM account WHERE id = 2")
                .await,
            "100"
        );
        assert_eq!(
            run(&client, "SELECT sum(balance) FROM account").await,
            [["300"]]
        );
        run(&client, end).await;
    }
    let sql = "SELECT id, balance FROM account ORDER BY id";
    assert_eq!(
        run(&client, sql).await,
        [["1", "90"], ["2", "110"], ["3", "100"]]
    );
    let (state, _) = {
        run(&client, "BEGIN").await;
        refused(&client, "BEGIN").await
    };
    assert_eq!(state, "25001");
    run(&client, "ROLLBACK").await;
    // One of a session that goes away is rolled back.
    let leaver = super::bank::client(&farm, 1).await;
    run(&leaver, "BEGIN").await;
    run(&leaver, "UPDATE account SET balance = 0").await;
    drop(leaver);
    run(
        &client,
        "UPDATE account SET balance = balance + 1 WHERE id = 1",
    )
    .await;
    assert_eq!(nodes.sum().await, 301);
}

#[tokio::test]
async fn an_error_of_a_node_fails_the_transaction_and_commit_rolls_it_back() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(nodes.options());
    let client = client(&farm, 0).await;
    run(&client, "INSERT INTO account VALUES (1, 100), (2, 100)").await;
    run(&client, "BEGIN").await;
    run(&client, "UPDATE account SET balance = 0 WHERE id = 1").await;
    assert_eq!(
        refused(&client, "INSERT INTO account VALUES (2, 1)")
            .await
            .0,
        "23505"
    );
    let (state, message) = refused(&client, "SELECT 1").await;
    assert_eq!(state, "58000");
    assert!(
        message.starts_with("Current transaction is aborted"),
        "{message}"
    );
    run(&client, "COMMIT").await;
    assert_eq!(nodes.sum().await, 200);
    // Unless there was a savepoint.
    run(&client, "BEGIN").await;
    run(&client, "UPDATE account SET balance = 1 WHERE id = 1").await;
    run(&client, "SAVEPOINT here").await;
    refused(&client, "INSERT INTO account VALUES (2, 1)").await;
    run(&client, "ROLLBACK TO SAVEPOINT here").await;
    run(&client, "UPDATE account SET balance = 1 WHERE id = 2").await;
    run(&client, "COMMIT").await;
    assert_eq!(nodes.sum().await, 2);
}

#[tokio::test]
async fn xa_prepares_on_both_nodes_with_gids_like_atomikos_s() {
    let nodes = Nodes::start(2).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        transaction: Transaction::Xa,
        ..nodes.options()
    });
    let client = client(&farm, 0).await;
    run(&client, "INSERT INTO account VALUES (1, 100), (2, 100)").await;
    let logged = |number: usize| nodes.clusters[number].log();
    // Every statement of the nodes goes to their logs from here on.
    for cluster in &nodes.clusters {
        cluster
            .execute("ALTER SYSTEM SET log_statement = 'all'")
            .await;
        cluster.execute("SELECT pg_reload_conf()").await;
    }
    until("both nodes log", async || {
        run(&client, "SELECT * FROM account").await;
        (0..2).all(|number| logged(number).contains("SELECT * FROM account"))
    })
    .await;
    run(&client, "BEGIN").await;
    run(
        &client,
        "UPDATE account SET balance = balance - 10 WHERE id = 1",
    )
    .await;
    run(
        &client,
        "UPDATE account SET balance = balance + 10 WHERE id = 2",
    )
    .await;
    run(&client, "COMMIT").await;
    for number in 0..2 {
        let log = logged(number);
        let prepared = log
            .find("PREPARE TRANSACTION '1096044365_")
            .expect("prepared");
        let committed = log.find("COMMIT PREPARED '1096044365_").expect("committed");
        assert!(prepared < committed);
        let gid = log[prepared..].split('\'').nth(1).unwrap();
        assert_eq!(gid.split('_').count(), 3, "{gid}");
    }
    // A change of several nodes without BEGIN is a transaction, too; one of one node needs no second phase.
    run(&client, "UPDATE account SET balance = balance + 1").await;
    run(&client, "BEGIN").await;
    run(
        &client,
        "UPDATE account SET balance = balance + 1 WHERE id = 2",
    )
    .await;
    run(&client, "COMMIT").await;
    assert_eq!(logged(0).matches("PREPARE TRANSACTION").count(), 2);
    assert_eq!(nodes.sum().await, 203);
    assert_eq!(
        nodes.ask(0, "SELECT count(*) FROM pg_prepared_xacts").await,
        "0"
    );
}

#[tokio::test]
async fn what_a_killed_proxy_left_prepared_is_ended_when_it_is_back() {
    let nodes = Nodes::start(1).await;
    let farm = ProxyFarm::start(ProxyFarmOptions {
        transaction: Transaction::Xa,
        ..nodes.options()
    });
    run(
        &client(&farm, 0).await,
        "INSERT INTO account VALUES (1, 100), (2, 100)",
    )
    .await;
    let left = "SELECT count(*) FROM pg_prepared_xacts";
    // Killed at some moment of a stream of commits, until one is caught in between.
    for round in 0..200 {
        let work = transfers(client(&farm, 0).await).await;
        tokio::time::sleep(std::time::Duration::from_millis(round % 17)).await;
        farm.kill(0);
        work.await.unwrap();
        let in_doubt = nodes.ask(0, left).await != "0";
        farm.restart(0);
        if in_doubt {
            until("nothing is in doubt", async || {
                nodes.ask(0, left).await == "0"
            })
            .await;
            assert_eq!(nodes.sum().await, 200);
            return;
        }
        until("XA leaves no half", async || nodes.sum().await == 200).await;
    }
    panic!("never caught between prepare and commit");
}
