use std::sync::atomic::{AtomicUsize, Ordering};

use agent_api::{EventKind, Look, MarkRequest, MarkResult, Observed, Phase, XidHolders};
use support::memory_store::MemoryStore;

use super::*;

/// What the test's engine does after it was started.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Act {
    /// As a real backup: copied, mark, ship, release.
    Whole,
    Panic,
    Fail,
}

struct TestEngines {
    act: Act,
    marks: Arc<AtomicUsize>,
}

impl Engines for TestEngines {
    fn store(&self, _: &RepositoryAccess) -> Result<Arc<dyn ObjectStore>, ApiError> {
        Ok(Arc::new(MemoryStore::default()))
    }

    fn backup(
        &self,
        cx: OperationContext,
        _: BackupSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        let act = self.act;
        let marks = Arc::clone(&self.marks);
        Box::pin(async move {
            match act {
                Act::Whole => whole(cx, Phase::Copied, commands, &marks).await,
                Act::Panic => panic!("at {}", cx.id),
                Act::Fail => Err(ApiError::new(ErrorKind::Database, "no server").changed()),
            }
        })
    }

    fn point(
        &self,
        cx: OperationContext,
        _: PointSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        let marks = Arc::clone(&self.marks);
        Box::pin(async move { whole(cx, Phase::Ready, commands, &marks).await })
    }

    fn restore(
        &self,
        cx: OperationContext,
        _: RestoreSpec,
        _: mpsc::Receiver<RestoreCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        Box::pin(async move {
            cx.cancel.cancelled().await;
            Err(ApiError::new(ErrorKind::Cancelled, "cancelled"))
        })
    }
}

async fn whole(
    cx: OperationContext,
    ready: Phase,
    mut commands: mpsc::Receiver<BackupCommand>,
    marks: &AtomicUsize,
) -> Result<(), ApiError> {
    cx.report.phase(ready);
    loop {
        let command = tokio::select! {
            command = commands.recv() => command.unwrap(),
            () = cx.cancel.cancelled() => {
                return Err(ApiError::new(ErrorKind::Cancelled, "cancelled"));
            }
        };
        match command {
            BackupCommand::Observe(look, answer) => {
                let _ = answer.send(Ok(Observed {
                    holders: (look != Look::Snapshot).then(XidHolders::default),
                    snapshot: (look != Look::Holders).then(|| "1:1:".to_owned()),
                    session: 1,
                    at: jiff::Timestamp::now(),
                    took_us: 1,
                }));
            }
            BackupCommand::Mark(request, answer) => {
                marks.fetch_add(1, Ordering::Relaxed);
                cx.report.phase(Phase::Marked);
                let result = MarkResult {
                    restore_point: request.restore_point,
                    end_lsn: "0/1".to_owned(),
                    timeline: 1,
                    made: jiff::Timestamp::now(),
                };
                let _ = answer.send(Ok(result));
            }
            BackupCommand::Flush(_, answer) => {
                let _ = answer.send(Ok(()));
            }
            BackupCommand::Ship(answer) => {
                cx.report.phase(Phase::Shipping);
                let _ = answer.send(Ok(()));
                cx.report.phase(Phase::Shipped);
            }
            BackupCommand::Release(answer) => {
                let _ = answer.send(Ok(()));
                return Ok(());
            }
        }
    }
}

fn table_with(act: Act, config: Config) -> (OperationTable, Arc<AtomicUsize>) {
    let marks = Arc::new(AtomicUsize::new(0));
    let engines = TestEngines {
        act,
        marks: Arc::clone(&marks),
    };
    let table = OperationTable::new(Arc::new(config), Arc::new(engines));
    (table, marks)
}

pub(crate) fn table(act: Act) -> OperationTable {
    table_with(act, Config::default()).0
}

pub(crate) fn backup(id: Uuid) -> StartOperation {
    let json = serde_json::json!({
        "operation": id,
        "repository": {"bucket": "b", "prefix": "p", "credentials": {
            "access_key_id": "A", "secret_access_key": "S3CR3T", "session_token": null
        }},
        "spec": {
            "kind": "backup", "backup_id": "20261121T040233Z-F-9f3c1a2b",
            "node_id": Uuid::nil(), "epoch": catalog::ids::EpochId::generate(1),
            "attempt": 1, "jobs": 1, "level": 1, "label": null, "fast_checkpoint": true
        },
        "bandwidth": null
    });
    serde_json::from_value(json).unwrap()
}

fn point() -> StartOperation {
    let spec = PointSpec {
        node_id: Uuid::nil(),
        epoch: catalog::ids::EpochId::generate(1),
        copy: None,
        marked: None,
    };
    StartOperation {
        spec: OperationSpec::Point(spec),
        ..backup(Uuid::now_v7())
    }
}

async fn end(operation: &Operation) -> OperationStatus {
    let mut news = operation.log().follow();
    let ended = news.wait_for(|news| news.ended);
    tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .expect("the operation ends")
        .unwrap();
    operation.status()
}

pub(crate) async fn reach(operation: &Operation, phase: Phase) {
    let mut news = operation.log().follow();
    let there = news.wait_for(|_| operation.status().phase == phase);
    tokio::time::timeout(Duration::from_secs(20), there)
        .await
        .unwrap_or_else(|_| panic!("{phase:?} is not reached"))
        .unwrap();
}

fn mark(name: &str) -> MarkRequest {
    MarkRequest {
        restore_point: name.to_owned(),
    }
}

#[tokio::test]
async fn a_backup_goes_through_its_commands_and_each_may_be_repeated() {
    let (table, marks) = table_with(Act::Whole, Config::default());
    let operation = table.start(backup(Uuid::now_v7())).unwrap();
    reach(&operation, Phase::Copied).await;
    assert_eq!(
        operation.ship().await.unwrap_err().kind,
        ErrorKind::Conflict
    );
    let seen = operation.observe(Look::Holders).await.unwrap();
    assert_eq!(
        (seen.holders, seen.snapshot),
        (Some(XidHolders::default()), None)
    );
    operation.mark(mark("one")).await.unwrap();
    let seen = operation.observe(Look::Snapshot).await.unwrap();
    assert_eq!((seen.holders, seen.snapshot), (None, Some("1:1:".into())));
    operation.mark(mark("one")).await.unwrap();
    assert_eq!(
        marks.load(Ordering::Relaxed),
        1,
        "the same name again makes no second point"
    );
    operation.mark(mark("two")).await.unwrap();
    operation.ship().await.unwrap();
    operation.ship().await.unwrap();
    reach(&operation, Phase::Shipped).await;
    let late = operation.observe(Look::Holders).await.unwrap_err();
    assert_eq!(late.kind, ErrorKind::Conflict);
    operation.release().await.unwrap();
    assert_eq!(end(&operation).await.phase, Phase::Done);
    operation.release().await.unwrap();
    let too_long = operation.mark(mark(&"x".repeat(64))).await.unwrap_err();
    assert_eq!(too_long.kind, ErrorKind::Usage);
    let events = operation.log().events_after(0);
    assert!(matches!(
        events.last().map(|event| &event.what),
        Some(EventKind::Phase { phase: Phase::Done })
    ));
    assert!(operation.log().events_after(events.len() as u64).is_empty());
}

#[tokio::test]
async fn the_same_request_finds_the_same_operation() {
    let table = table(Act::Whole);
    let request = backup(Uuid::now_v7());
    let first = table.start(request.clone()).unwrap();
    let mut newer = request.clone();
    newer.repository.credentials = None;
    let second = table.start(newer).unwrap();
    assert!(
        Arc::ptr_eq(&first, &second),
        "credentials may have changed meanwhile"
    );
    let mut other = request;
    other.bandwidth = Some(5);
    assert_eq!(table.start(other).unwrap_err().kind, ErrorKind::Conflict);
    let in_the_way = table.start(backup(Uuid::now_v7())).unwrap_err();
    assert_eq!(in_the_way.kind, ErrorKind::Conflict);
    let named = in_the_way.message.contains(&first.id.to_string());
    assert!(named, "{in_the_way}");
    first.cancel(ApiError::new(ErrorKind::Cancelled, "asked"));
    let status = end(&first).await;
    assert_eq!(status.phase, Phase::Cancelled);
    assert_eq!(status.error.unwrap().message, "asked");
    table.start(backup(Uuid::now_v7())).unwrap();
}

#[tokio::test]
async fn a_point_goes_beside_a_backup_and_is_alone_among_points() {
    let table = table(Act::Whole);
    let backup = table.start(backup(Uuid::now_v7())).unwrap();
    let first = table.start(point()).unwrap();
    reach(&first, Phase::Ready).await;
    assert_eq!(first.status().kind, "point");
    assert_eq!(first.status().backup_id, None);
    let second = table.start(point()).unwrap_err();
    assert_eq!(second.kind, ErrorKind::Conflict);
    assert!(second.passing, "it is over soon");
    let early = first.ship().await.unwrap_err();
    assert_eq!(early.kind, ErrorKind::Conflict);
    first.observe(Look::Holders).await.unwrap();
    first.mark(mark("one")).await.unwrap();
    first.ship().await.unwrap();
    reach(&first, Phase::Shipped).await;
    first.release().await.unwrap();
    assert_eq!(end(&first).await.phase, Phase::Done);
    table.start(point()).unwrap();
    assert!(!backup.log().has_ended());
}

#[tokio::test]
async fn a_panic_ends_the_operation_only() {
    let table = table(Act::Panic);
    let operation = table.start(backup(Uuid::now_v7())).unwrap();
    let status = end(&operation).await;
    assert_eq!(status.phase, Phase::Failed);
    let error = status.error.unwrap();
    assert_eq!((error.kind, error.changed), (ErrorKind::Internal, true));
    assert!(error.message.contains(&operation.id.to_string()), "{error}");
    let late = operation.mark(mark("x")).await.unwrap_err();
    assert_eq!(late.kind, ErrorKind::Internal);
}

#[tokio::test]
async fn a_failure_is_the_last_event() {
    let table = table(Act::Fail);
    let operation = table.start(backup(Uuid::now_v7())).unwrap();
    end(&operation).await;
    let events = operation.log().events_after(0);
    let last = &events.last().unwrap().what;
    assert!(matches!(last, EventKind::Error { error } if error.message == "no server"));
}

#[tokio::test]
async fn an_operation_nobody_asks_about_is_cancelled_while_it_waits() {
    let config = Config {
        orphan_timeout: Duration::from_secs(3),
        ..Config::default()
    };
    let (table, _) = table_with(Act::Whole, config);
    let operation = table.start(backup(Uuid::now_v7())).unwrap();
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let asked = table.get(operation.id).unwrap();
        assert_eq!(
            asked.status().phase,
            Phase::Copied,
            "it is being asked about"
        );
    }
    let status = end(&operation).await;
    assert_eq!(status.phase, Phase::Cancelled);
    let error = status.error.unwrap();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert!(error.message.contains("orphan"), "{error}");
}

#[tokio::test]
async fn the_last_hundred_are_kept_and_none_starts_after_the_end() {
    let table = table(Act::Fail);
    let mut first = None;
    for _ in 0..=ENDED_KEPT + 1 {
        let id = Uuid::now_v7();
        first.get_or_insert(id);
        let operation = table.start(backup(id)).unwrap();
        end(&operation).await;
    }
    assert_eq!(table.list().len(), ENDED_KEPT + 1);
    assert_eq!(
        table.get(first.unwrap()).unwrap_err().kind,
        ErrorKind::NotFound
    );
    assert!(table.shut_down(Duration::from_secs(5)).await);
    assert!(table.start(backup(Uuid::now_v7())).is_err());
}

#[tokio::test]
async fn stopping_the_agent_cancels_what_runs() {
    let table = table(Act::Whole);
    let operation = table.start(backup(Uuid::now_v7())).unwrap();
    reach(&operation, Phase::Copied).await;
    assert!(table.shut_down(Duration::from_secs(5)).await);
    assert_eq!(operation.status().phase, Phase::Cancelled);
}

#[tokio::test]
async fn nothing_of_the_credentials_is_kept_or_printed() {
    let table = table(Act::Whole);
    let request = backup(Uuid::now_v7());
    assert!(!format!("{request:?}").contains("S3CR3T"));
    let operation = table.start(request).unwrap();
    assert!(!format!("{operation:?}").contains("S3CR3T"));
}

#[test]
fn a_target_inside_anothers_is_in_the_way() {
    let target = |path: &str| Claim::Target {
        path: path.into(),
        node: false,
    };
    assert!(target("/a/b").overlaps(&target("/a")) && target("/a").overlaps(&target("/a/b")));
    assert!(!target("/a/b").overlaps(&target("/a/bc")) && !target("/a").overlaps(&Claim::Node));
    let here = Claim::Target {
        path: "/a".into(),
        node: true,
    };
    assert!(here.overlaps(&Claim::Points) && Claim::Points.overlaps(&here));
    assert!(!target("/a").overlaps(&Claim::Points));
}
