//! What the proxies know, when it has changed since the point.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use support::bank::wire::Session;
use support::fleet::Run;
use support::sharded::NODE_PASSWORD;

use crate::scene::{Scene, say};

/// What proxies need to be told of a change.
const SETTLE: Duration = Duration::from_secs(30);
const PROTOCOL: &str = "proxy-frontend-database-protocol-type";
const RULE: &str = r#"CREATE SHARDING TABLE RULE extra (STORAGE_UNITS(ds_0, ds_1), SHARDING_COLUMN=id,
    TYPE(NAME="mod", PROPERTIES("sharding-count"="2")))"#;

impl Scene {
    fn metadata(&self, point: &str, more: &[&str]) -> Run {
        let args = ["--output", "json", "metadata", point];
        self.cluster.run(&[&args, more].concat())
    }

    /// What differs of each database, by its name.
    fn differs(&self, point: &str) -> Vec<(String, String)> {
        let shown = self.metadata(point, &[]).good().result();
        let databases = shown["databases"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        databases
            .map(|it| (text(&it["database"]), text(&it["change"])))
            .collect()
    }

    /// Waits until that is what differs: the first proxy hears of what it was told itself a moment later.
    async fn until_differs(&self, point: &str, expected: &[(&str, &str)]) {
        let begun = Instant::now();
        loop {
            let found = self.differs(point);
            let found: Vec<_> = found.iter().map(|(name, how)| (&**name, &**how)).collect();
            if found == expected {
                return;
            }
            let late = begun.elapsed() >= SETTLE;
            assert!(!late, "{:#}", self.metadata(point, &[]).result());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What a proxy says to a statement of which one value is wanted.
    async fn said(&self, sql: &str) -> Option<String> {
        let session = Session::open(&self.cluster.access(0, "postgres")).await;
        let mut rows = session.unwrap().query(sql).await.unwrap();
        rows.pop()?.pop()?
    }

    /// Properties of the whole cluster, in some order.
    async fn properties(&self) -> Vec<String> {
        let exported = self.said("EXPORT METADATA").await.unwrap();
        let exported = STANDARD.decode(exported).unwrap();
        let exported: Value = serde_json::from_slice(&exported).unwrap();
        let props = exported["meta_data"]["props"].as_str().unwrap();
        let mut lines: Vec<_> = props.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    }

    /// A file of secrets for the storage units of the point.
    fn secrets(&self, name: &str, password: &str) -> PathBuf {
        let path = self.cluster.fleet.path().join(name);
        let units = 0..self.cluster.databases().len();
        let lines = units.map(|unit| {
            format!("meta_data.databases.bank.dataSources.ds_{unit}.password={password}\n")
        });
        fs::write(&path, lines.collect::<String>()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }
}

/// One rule more than there was.
pub(crate) async fn change(scene: &Scene) {
    let access = &scene.cluster.ways().proxies[0];
    let mut session = Session::open(access).await.unwrap();
    session.query(RULE).await.unwrap();
}

/// It is shown, and imported if that is asked for; an import that fails is taken back.
pub(crate) async fn changed_since_the_point(scene: &mut Scene) {
    let shown = scene.cluster.run(&["--output", "json", "point", "list"]);
    let shown = shown.good().result();
    let point = shown["points"][0]["point_id"].as_str().unwrap().to_owned();
    let point = point.as_str();
    assert_eq!(scene.differs(point), []);
    let properties = scene.properties().await;

    change(scene).await;
    let changed = [("bank", "settings")];
    scene.until_differs(point, &changed).await;

    nothing_is_imported_without_the_protocol(scene, point).await;
    assert_eq!(scene.properties().await, properties);

    // A storage unit cannot be connected with that, so nothing is imported.
    let wrong = scene.secrets("wrong", "no-password-of-anybody");
    let wrong = wrong.to_str().unwrap();
    let failed = scene.metadata(point, &["--import", "--yes", "--metadata-secrets", wrong]);
    let error = &failed.result()["error"];
    let message = error["message"]
        .as_str()
        .unwrap_or_else(|| panic!("{failed:?}"));
    say(message);
    assert!(message.contains("is there again"), "{error}");
    assert!(
        error["next"].to_string().contains("--metadata-secrets"),
        "{error}"
    );
    assert_eq!(error["changed"], false, "{error}");
    for text in [&failed.stdout, &failed.stderr] {
        assert!(!text.contains("no-password-of-anybody") && !text.contains(NODE_PASSWORD));
    }
    scene.until_usable().await;
    scene.until_differs(point, &changed).await;
    assert_eq!(scene.properties().await, properties);

    // With the restore. The passwords are those that the proxies know.
    let run = scene.restoring(&["--import-metadata"]).end().await.good();
    assert!(run.stdout.contains("\"event\":\"imported\""), "{run:?}");
    assert!(!run.stdout.contains(NODE_PASSWORD));
    say("imported with the restore");
    scene.until_usable().await;
    scene.until_differs(point, &[]).await;
    // It exports more of its storage units than it did.
    scene.cluster.restart_proxy(0).await;
    scene.until_usable().await;
    scene.until_differs(point, &[]).await;

    // Without the database nobody knows its passwords.
    scene.said("DROP DATABASE bank").await;
    scene.until_differs(point, &[("bank", "missing")]).await;
    let unknown = scene.metadata(point, &["--import", "--yes"]);
    assert_eq!(unknown.code, 2, "{unknown:?}");
    let message = unknown.result()["error"]["message"].to_string();
    assert!(message.contains("dataSources.ds_0.password"), "{message}");
    let right = scene.secrets("right", NODE_PASSWORD);
    let right = right.to_str().unwrap();
    let args = ["--import", "--yes", "--metadata-secrets", right];
    let imported = scene.metadata(point, &args).good().result();
    assert_eq!(imported["imported"], serde_json::json!(["bank"]));
    scene.until_usable().await;
    scene.until_differs(point, &[]).await;
    assert_eq!(scene.properties().await, properties);
}

/// Proxies that were not told which protocol they speak, or were made to forget it, cannot import: that is said before anything is
/// dropped, with what helps.
async fn nothing_is_imported_without_the_protocol(scene: &mut Scene, point: &str) {
    let nothing =
        r#"{"meta_data":{"databases":{},"props":"props:\n  system-log-level: INFO\n","rules":""}}"#;
    let nothing = format!("IMPORT METADATA '{}'", STANDARD.encode(nothing));
    let has_protocol = async |scene: &Scene| {
        let properties = scene.properties().await;
        properties.iter().any(|line| line.contains(PROTOCOL))
    };
    let kept = scene.properties().await;
    scene.said(&nothing).await;
    let begun = Instant::now();
    while has_protocol(&*scene).await {
        assert!(begun.elapsed() < SETTLE, "it still has the protocol");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let refused = scene.metadata(point, &["--import", "--yes"]);
    let error = &refused.result()["error"];
    assert_eq!(error["changed"], false, "{error}");
    assert!(
        error["message"].to_string().contains(PROTOCOL)
            && error["next"].to_string().contains("SET DIST VARIABLE"),
        "{error}"
    );
    scene.until_usable().await;
    for line in kept.iter().filter(|line| line.starts_with(' ')) {
        let (name, value) = line.trim().split_once(": ").unwrap();
        let name = name.replace('-', "_");
        scene
            .said(&format!("SET DIST VARIABLE {name} = '{value}'"))
            .await;
        // Another SET before this one is known takes it back.
        let begun = Instant::now();
        while !scene.properties().await.contains(line) {
            assert!(begun.elapsed() < SETTLE, "{line}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let begun = Instant::now();
    while scene.properties().await != kept {
        assert!(begun.elapsed() < SETTLE, "{:?}", scene.properties().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
