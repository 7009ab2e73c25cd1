//! `gs_pitr operations resume`: a restore that was left is brought to its end, from whatever host.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use agent_api::{ErrorKind, Place, Secret, UnfinishedRestore};
use catalog::Catalog;
use catalog::fence::Abandoned;
use catalog::journal::OperationJournal;
use catalog::model::{LeaseScope, MetadataAfter, OperationEvent, RestorePlan, Verdict};
use catalog::repo::JournalledOperation;
use futures_util::future::join_all;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::ResumeArgs;
use super::list::{self, State};
use super::reach::{self, Reached};
use crate::cluster::ProxyAccess;
use crate::commands::restore::{Clients, IMPORTED, Open, agreed, metadata, report};
use crate::consent;
use crate::coordinator::shardingsphere::Switch;
use crate::failure::{Failure, Result};
use crate::leased::Leased;
use crate::operations::{Live, Operation};
use crate::printer::Printer;
use crate::restoring::{Member, Part, Restoring};
use crate::settings::Settings;
use crate::{journalled, repo, signals};

const COMMAND: &str = "operations resume";
/// How long it is tried to lock the cluster: its nodes may be closed already.
const PATIENCE: Duration = Duration::from_secs(10);

/// What every step needs.
struct Job<'a> {
    args: &'a ResumeArgs,
    settings: &'a Settings,
    printer: &'a Printer,
    live: &'a Live,
    /// The way to the proxies, if they are known.
    access: Option<ProxyAccess>,
    cancel: CancellationToken,
    /// Of the proxies' metadata, by the names of their placeholders.
    secrets: BTreeMap<String, Secret>,
}

/// Runs the command.
pub(super) async fn run(args: &ResumeArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    consent::possible(settings)?;
    let access = args.proxy.access(settings, printer)?;
    args.lock.check(access.is_some())?;
    let secrets = args.secrets.read()?;
    let (live, cancel) = (Live::default(), CancellationToken::new());
    let job = Job {
        args,
        settings,
        printer,
        live: &live,
        access,
        cancel: cancel.clone(),
        secrets,
    };
    signals::guarded(Uuid::now_v7(), settings, printer, &live, &cancel, job.run()).await
}

impl Job<'_> {
    async fn run(&self) -> Result<()> {
        let found = async {
            let catalog = repo::open(self.settings).await?;
            let id = catalog.resolve_operation_id(&self.args.id).await?;
            let journal = catalog.operation(id).await?;
            Ok::<_, Failure>((catalog, journal))
        };
        let (catalog, journal) = tokio::select! {
            found = found => found?,
            () = self.cancel.cancelled() => return Err(Failure::cancelled()),
        };
        let leases = list::leases(&catalog).await?;
        let shown = list::shown(&catalog, &journal, &leases).await?;
        let id = journal.operation;
        match (shown.state, journal.kind()) {
            (State::Running, _) => {
                let by = shown.by.unwrap_or_else(|| "somebody".to_owned());
                let message = format!("operation {id} is running: {by} holds its lease");
                let next = "wait until it has ended, or until its lease has run out";
                Err(Failure::new(ErrorKind::Conflict, message).next(next))
            }
            (State::Ended | State::Failed, _) => {
                let how = match &shown.why {
                    None => "it has ended well".to_owned(),
                    Some(why) => format!("it has ended with: {why}"),
                };
                self.said(id, "ended", &format!("{how}; there is nothing to do"));
                Ok(())
            }
            (_, Some("restore")) => self.restore(&catalog, &journal, shown.decision).await,
            (_, Some("backup")) => self.backup(&catalog, &journal).await,
            (_, kind) => {
                let kind = kind.unwrap_or("unknown kind");
                let text = format!(
                    "an operation of {kind} leaves nothing to go on with: run its command again"
                );
                self.said(id, "nothing", &text);
                Ok(())
            }
        }
    }

    fn said(&self, operation: Uuid, outcome: &str, text: &str) {
        self.printer.text(&format!("operation {operation}: {text}"));
        self.printer
            .result(COMMAND, json!({"operation": operation, "outcome": outcome}));
    }

    /// Nobody can go on with a backup; what is left of it is made safe to remove.
    async fn backup(&self, catalog: &Catalog, journal: &JournalledOperation) -> Result<()> {
        let id = journal.operation;
        let Some(backup) = journal.backup() else {
            self.said(id, "nothing", "it made no backup");
            return Ok(());
        };
        let (outcome, text) = match catalog.abandon(backup, id).await? {
            Abandoned::Fenced => (
                "fenced",
                format!(
                    "backup {backup} was not complete and can never be completed now; `gs_pitr prune` removes what is left of it"
                ),
            ),
            Abandoned::Complete(_) => ("complete", format!("backup {backup} is complete")),
        };
        let journal = OperationJournal::join(Arc::clone(catalog.store()), id);
        let why = (outcome == "fenced").then_some("it was left before its end");
        journalled::ended(&journal, why, self.printer).await;
        self.said(id, outcome, &text);
        Ok(())
    }

    async fn restore(
        &self,
        catalog: &Catalog,
        journal: &JournalledOperation,
        decision: Option<Verdict>,
    ) -> Result<()> {
        let id = journal.operation;
        let Some(plan) = journal.plan() else {
            return self.unplanned(catalog, id).await;
        };
        let given_up = self.given_up(plan, journal, decision)?;
        let (maps, cancel) = (&self.args.map, &self.cancel);
        let mut reached = reach::reach(plan, maps, self.settings, self.printer, cancel).await?;
        reached.retain(|node| !given_up.contains(&node.planned.node_id));
        let switch = self.switch(catalog, id, plan, &reached);
        let clients = match (decision, &switch) {
            (Some(Verdict::Commit), Ok(switch)) => {
                let proxies = switch.access.configured.iter();
                Some(Clients::KeptOut(proxies.map(ToString::to_string).collect()))
            }
            (Some(Verdict::Commit), Err(why)) => Some(Clients::Open(*why)),
            _ => None,
        };
        let found = (reached.as_slice(), given_up.as_slice());
        self.agreed(id, plan, found, decision, clients.as_ref())
            .await?;
        let leased = self.lease(catalog, id).await?;
        let restoring = Restoring {
            catalog,
            settings: self.settings,
            printer: self.printer,
            live: self.live,
            operation: id,
            plan,
            switch: switch.ok(),
        };
        let outcome = self.ended(&restoring, &reached, &given_up).await;
        // Whatever is left is decided, so nobody has to fence it.
        leased.release().await;
        outcome
    }

    /// How clients are kept out while what is left is switched and opened, or why nobody does.
    fn switch<'b>(
        &'b self,
        catalog: &'b Catalog,
        operation: Uuid,
        plan: &RestorePlan,
        reached: &[Reached<'_>],
    ) -> std::result::Result<Switch<'b>, Open> {
        let places = || plan.nodes.iter().map(|node| node.place);
        if plan.clone || places().all(|place| place == Place::Fresh) {
            return Err(Open::Beside);
        }
        if self.args.lock.is_never() {
            return Err(Open::AsAsked);
        }
        let access = self.access.as_ref().ok_or(Open::NoProxy)?;
        if places().any(|place| matches!(place, Place::InPlace { .. })) {
            return Err(Open::Stopped);
        }
        let found = reached.iter().filter_map(|node| node.found.as_ref().ok());
        Ok(Switch {
            access,
            silence: self.args.lock.silence(),
            patience: PATIENCE,
            agents: found.map(|found| Arc::clone(&found.host.agent)).collect(),
            catalog,
            operation,
            live: self.live,
            printer: self.printer,
        })
    }

    /// The nodes that are lost for good, now and in earlier runs.
    fn given_up(
        &self,
        plan: &RestorePlan,
        journal: &JournalledOperation,
        decision: Option<Verdict>,
    ) -> Result<Vec<Uuid>> {
        let mut given_up: Vec<Uuid> = journal.given_up().collect();
        for text in &self.args.without {
            let node = plan.nodes[reach::find(plan, "--without", text)?].node_id;
            if decision != Some(Verdict::Commit) {
                let message = format!(
                    "`--without {text}`: the restore goes back, so nothing waits for node {node}"
                );
                return Err(Failure::usage(message).next("leave `--without` out"));
            }
            if journal.promoted().any(|promoted| promoted.node_id == node) {
                let message = format!(
                    "`--without {text}`: node {node} is promoted and only has to be opened"
                );
                return Err(
                    Failure::usage(message).next("leave `--without` out, and start its agent")
                );
            }
            if !given_up.contains(&node) {
                given_up.push(node);
            }
        }
        if given_up.len() == plan.nodes.len() {
            let message = "`--without` names every node of the restore";
            return Err(Failure::usage(message));
        }
        Ok(given_up)
    }

    async fn lease(&self, catalog: &Catalog, id: Uuid) -> Result<Leased> {
        Leased::take(
            catalog,
            LeaseScope::Restore,
            id,
            "gs_pitr operations resume",
            self.settings,
            self.printer,
            &self.cancel,
        )
        .await
    }

    /// It was left before an agent knew of it.
    async fn unplanned(&self, catalog: &Catalog, id: Uuid) -> Result<()> {
        let leased = self.lease(catalog, id).await?;
        let journal = OperationJournal::join(Arc::clone(catalog.store()), id);
        journalled::ended(&journal, Some("it was left before it began"), self.printer).await;
        leased.release().await;
        self.said(
            id,
            "rolled-back",
            "no agent had begun; nothing is left of it",
        );
        Ok(())
    }

    /// Shows what will be done, and has it confirmed.
    async fn agreed(
        &self,
        id: Uuid,
        plan: &RestorePlan,
        (reached, given_up): (&[Reached<'_>], &[Uuid]),
        decision: Option<Verdict>,
        clients: Option<&Clients>,
    ) -> Result<()> {
        let how = match decision {
            Some(Verdict::Commit) => "it is decided, so every node goes forward",
            Some(Verdict::Rollback) => "it was rolled back, so every node goes back",
            None => "it was left before it was decided, so every node goes back",
        };
        let mut text = format!(
            "plan: end the restore {id} of backup {}: {how}",
            plan.backup_id
        );
        for node in reached {
            let (becomes, target) = (node.planned.becomes, &node.planned.target);
            let _ = write!(
                text,
                "\n  node {becomes}: directory {target}, {}",
                state(node)
            );
        }
        for node in given_up {
            let _ = write!(
                text,
                "\n  node {node}: GIVEN UP. The others are opened without it, and go on from the point; bring it back to the \
                 same point later: gs_pitr restore --point {} --id {} --node {node}",
                plan.point_id, plan.backup_id
            );
        }
        if let Some(clients) = clients {
            let _ = write!(text, "\n  {}", clients.words());
        }
        let forward = decision == Some(Verdict::Commit);
        let imports = forward && plan.metadata == MetadataAfter::Import && self.access.is_some();
        if imports {
            let _ = write!(text, "\n  {IMPORTED}");
        }
        let nodes: Vec<_> = reached
            .iter()
            .map(|node| json!({"node_id": node.planned.becomes, "data_directory": node.planned.target, "state": state(node)}))
            .collect();
        let fields = json!({"operation": id, "backup_id": plan.backup_id, "forward": forward, "nodes": nodes, "given_up": given_up, "clients": clients.map(Clients::fields), "import_metadata": imports});
        self.printer.event("plan", fields, Some(&text));
        agreed("Do this?", self.settings, self.printer, &self.cancel).await
    }

    async fn ended(
        &self,
        restoring: &Restoring<'_>,
        reached: &[Reached<'_>],
        given_up: &[Uuid],
    ) -> Result<()> {
        let reason = "it was left before it was decided";
        let verdict = restoring.decided(Verdict::Rollback, Some(reason)).await?;
        let _signs = self.live.signs_of_life();
        let store = Arc::clone(restoring.catalog.store());
        let journal = OperationJournal::join(store, restoring.operation);
        match verdict {
            Verdict::Rollback => {
                self.back(restoring, reached).await?;
                journalled::ended(&journal, Some("it was rolled back"), self.printer).await;
                let text = "every node is as it was before";
                self.said(restoring.operation, "rolled-back", text);
            }
            Verdict::Commit => {
                self.write_given_up(restoring, &journal, given_up).await?;
                let opened = self.forward(restoring, reached).await?;
                let (access, there) = (self.access.as_ref(), (restoring.catalog, &journal));
                let plan = restoring.plan;
                let known = metadata(plan, access, &self.secrets, there, self.printer).await;
                let why = known.as_ref().err().map(ToString::to_string);
                journalled::ended(&journal, why.as_deref(), self.printer).await;
                known?;
                report(COMMAND, plan, &opened, self.printer);
            }
        }
        Ok(())
    }

    /// Says in the journal which nodes nobody waits for any more. An agent of one that comes back finds it there, and
    /// opens nothing.
    async fn write_given_up(
        &self,
        restoring: &Restoring<'_>,
        journal: &OperationJournal,
        given_up: &[Uuid],
    ) -> Result<()> {
        let known = restoring.catalog.operation(restoring.operation).await?;
        for node_id in given_up.iter().copied() {
            if !known.given_up().any(|known| known == node_id) {
                journal
                    .record(OperationEvent::NodeGivenUp { node_id })
                    .await?;
            }
        }
        Ok(())
    }

    /// Has what an agent still has of the restore taken up again; `None`: it has nothing.
    async fn taken_up(
        &self,
        restoring: &Restoring<'_>,
        node: &Reached<'_>,
        part: &Part,
    ) -> Result<Option<Operation>> {
        let (live, printer) = (self.live, self.printer);
        let (becomes, id) = (part.planned.becomes, part.planned.operation);
        let never = CancellationToken::new();
        // What was seen before the question may be old.
        let restores = part.agent.restores(&never).await?;
        let unfinished = restores
            .unfinished
            .into_iter()
            .find(|it| it.operation == id);
        match unfinished {
            Some(UnfinishedRestore {
                running: false,
                spec,
                ..
            }) => {
                let request = restoring.request(part, *spec).await?;
                Operation::start(&part.agent, becomes, &request, live, printer, &never)
                    .await
                    .map(Some)
            }
            Some(_) => Ok(Some(Operation::find(
                &part.agent,
                becomes,
                id,
                live,
                printer,
            ))),
            None => Ok(node
                .status()
                .map(|_| Operation::find(&part.agent, becomes, id, live, printer))),
        }
    }

    async fn back(&self, restoring: &Restoring<'_>, reached: &[Reached<'_>]) -> Result<()> {
        let begun = reached.iter().map(|node| async move {
            let part = part(node)?;
            self.taken_up(restoring, node, &part).await?;
            Ok::<_, Failure>(part)
        });
        let (mut parts, mut failures) = (Vec::new(), Vec::new());
        for outcome in join_all(begun).await {
            match outcome {
                Ok(part) => parts.push(part),
                Err(failure) => failures.push(failure),
            }
        }
        self.live.cancel_all(self.printer).await;
        let never = CancellationToken::new();
        for part in parts {
            let here = part.agent.restores(&never).await?;
            let operation = part.planned.operation;
            if here.unfinished.iter().any(|it| it.operation == operation) {
                let message = "the agent has not gone back yet; its log says why";
                failures.push(Failure::new(ErrorKind::Conflict, message).on(part.agent.name()));
            }
        }
        restoring.none_of(failures, "the other nodes are as they were before")
    }

    async fn forward(
        &self,
        restoring: &Restoring<'_>,
        reached: &[Reached<'_>],
    ) -> Result<Vec<crate::restoring::Opened>> {
        let journal = restoring.catalog.operation(restoring.operation).await?;
        let promoted: Vec<_> = journal.promoted().map(|node| node.node_id).collect();
        let promoted = &promoted;
        // What agents have left of it goes on as soon as it is taken up. From here on all ways lead to where it is given back.
        let lock = match restoring.locked(&self.cancel).await {
            Ok(lock) => lock,
            Err(failure) if failure.kind == ErrorKind::Cancelled => {
                return Err(restoring.left(failure));
            }
            // Nodes are closed and wait: that is worse than a client who is not kept out.
            Err(failure) => {
                let message = format!("{}; it goes on without the lock", failure.message);
                self.printer.warning(failure.node.as_deref(), &message);
                None
            }
        };
        let members = reached.iter().map(|node| async move {
            let is_promoted = promoted.contains(&node.planned.node_id);
            let taken_up = async {
                let part = part(node)?;
                let member = match self.taken_up(restoring, node, &part).await? {
                    Some(operation) => Member::Working(Box::new(operation)),
                    None if is_promoted => Member::Done,
                    None => return Err(lost(&part)),
                };
                Ok((part, member))
            };
            taken_up.await.map_err(|failure| (failure, is_promoted))
        });
        let (mut nodes, mut away) = (Vec::new(), Vec::new());
        for member in join_all(members).await {
            match member {
                Ok(node) => nodes.push(node),
                Err(failure) => away.push(failure),
            }
        }
        restoring.forward(nodes, away, lock).await
    }
}

/// The part of a node whose agent is there.
fn part(node: &Reached<'_>) -> Result<Part> {
    let found = node.found.as_ref().map_err(Clone::clone)?;
    Ok(Part {
        planned: node.planned.clone(),
        agent: Arc::clone(&found.host.agent),
        lend: !found.host.facts.has_credentials,
    })
}

fn lost(part: &Part) -> Failure {
    let planned = &part.planned;
    let message = format!(
        "the agent has nothing of node {} any more, and it was not promoted: what was made in `{}` is gone",
        planned.becomes, planned.target
    );
    Failure::new(ErrorKind::NotFound, message).on(part.agent.name())
}

/// Where a node stands, in a person's words.
fn state(node: &Reached<'_>) -> String {
    let found = match &node.found {
        Ok(found) => found,
        Err(failure) => return format!("its agent is away: {}", failure.message),
    };
    let name = found.host.agent.name();
    if let Some(status) = node.status().filter(|status| !status.phase.is_end()) {
        return format!("agent {name}: {}", status.phase);
    }
    let it = node.planned.operation;
    let unfinished = found
        .restores
        .unfinished
        .iter()
        .find(|left| left.operation == it);
    match (unfinished, node.status()) {
        (Some(left), _) => format!("agent {name}: interrupted while {}", words(left)),
        (None, Some(status)) => format!("agent {name}: {}", status.phase),
        (None, None) => format!("agent {name}: has nothing of it"),
    }
}

fn words(left: &UnfinishedRestore) -> &'static str {
    use agent_api::RestoreState as S;
    match left.state {
        S::Making => "its copy was made",
        S::Proved => "its copy was proved",
        S::Promoted => "its copy was promoted beside the target",
        S::Switching => "it was put in its place",
        S::InPlace => "it stood in its place, closed",
    }
}
