//! A model of nodes and clients, in which every order of events is tried against the real [`attempt`].
//!
//! A commit is three events, as in the server: its record is in the WAL; the snapshot no longer shows it as
//! running; its lock is gone. On openGauss it has a number before all that, and that is what its snapshots show. A
//! restore point has what was in the WAL before it. A step is left out of the proof by having the nodes answer what it
//! wants to hear.

use std::cell::RefCell;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use agent_api::{ApiError, Look, MarkResult, Observed, PreparedAs, XidHolder, XidHolders};
use jiff::Timestamp;

use super::{Node, Proved, Rules, attempt};
use crate::coordinator::obstacle::Obstacle;

/// What of the proof is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// S1 = S2.
    Snapshots,
    N1,
    N2,
    N1AndN2,
    /// N2 before S2: here S2 comes first.
    Order,
}

/// Whose snapshots they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    PostgreSql,
    OpenGauss,
}

/// How a client commits on several nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// Prepares on all, then commits on all, in any order.
    TwoPhase,
    /// The same; and it has been prepared for long when it is seen so.
    InDoubt,
    /// Writes on all, then commits on one after the other.
    OneByOne,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Stage {
    Idle,
    /// It has an id, and its lock.
    Holds,
    Prepared,
    /// openGauss: it has the number of its commit.
    Numbered,
    /// Its commit record is written.
    InWal,
    /// No snapshot shows it as running.
    Visible,
    /// Its lock is gone.
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leg {
    node: usize,
    stage: Stage,
    xid: u32,
    /// Whether its commit record is before the node's restore point.
    in_point: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Client {
    way: Way,
    legs: Vec<Leg>,
}

impl Client {
    fn new(way: Way, nodes: &[usize]) -> Self {
        let leg = |node: &usize| Leg {
            node: *node,
            stage: Stage::Idle,
            xid: 0,
            in_point: false,
        };
        let legs = nodes.iter().map(leg).collect();
        Self { way, legs }
    }

    /// What leg `at` may do now.
    fn next(&self, at: usize, kind: Kind) -> Option<Stage> {
        let commit = match kind {
            Kind::PostgreSql => Stage::InWal,
            Kind::OpenGauss => Stage::Numbered,
        };
        let all = |stage| self.legs.iter().all(|leg| leg.stage >= stage);
        let before_done = self.legs[..at].iter().all(|leg| leg.stage == Stage::Done);
        let one_by_one = self.way == Way::OneByOne;
        match self.legs[at].stage {
            Stage::Idle => Some(Stage::Holds),
            Stage::Holds if !one_by_one => Some(Stage::Prepared),
            Stage::Holds => (all(Stage::Holds) && before_done).then_some(commit),
            Stage::Prepared => all(Stage::Prepared).then_some(commit),
            Stage::Numbered => Some(Stage::InWal),
            Stage::InWal => Some(Stage::Visible),
            Stage::Visible => Some(Stage::Done),
            Stage::Done => None,
        }
    }

    /// In half of the restore points only.
    fn is_torn(&self) -> bool {
        let first = self.legs[0].in_point;
        self.legs.iter().any(|leg| leg.in_point != first)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Request {
    Holders,
    Snapshot,
    Both,
    Mark,
}

/// What a node was asked and has answered so far in this request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Pending {
    request: Option<Request>,
    holders: Option<Vec<(usize, bool)>>,
    snapshot: Option<String>,
    ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    kind: Kind,
    clients: Vec<Client>,
    /// Per node: the last id given out.
    last_xid: Vec<u32>,
    /// Per node: the last commit number given out.
    last_number: Vec<u32>,
    /// Per node: ids that ended, as bits.
    ended: Vec<u32>,
    marked: Vec<bool>,
    pending: Vec<Pending>,
    /// Per node: a digest of all that the proof has been told; with the rest, that is its whole state.
    told: Vec<u64>,
}

impl World {
    fn new(kind: Kind, clients: &[Client], nodes: usize) -> Self {
        Self {
            kind,
            clients: clients.to_vec(),
            last_xid: vec![0; nodes],
            last_number: vec![0; nodes],
            ended: vec![1; nodes],
            marked: vec![false; nodes],
            pending: vec![Pending::default(); nodes],
            told: vec![0; nodes],
        }
    }

    fn client_moves(&mut self, client: usize, at: usize, stage: Stage) {
        let leg = &mut self.clients[client].legs[at];
        let node = leg.node;
        leg.stage = stage;
        match stage {
            Stage::Holds => {
                self.last_xid[node] += 1;
                leg.xid = self.last_xid[node];
            }
            Stage::Numbered => self.last_number[node] += 1,
            Stage::InWal => leg.in_point = !self.marked[node],
            Stage::Visible => self.ended[node] |= 1 << leg.xid,
            Stage::Idle | Stage::Prepared | Stage::Done => {}
        }
    }

    /// As `txid_current_snapshot()`: an upper bound behind the last id that ended, and what runs below it. On openGauss
    /// as `gs_get_next_xid_csn()`.
    fn snapshot(&self, node: usize) -> String {
        if self.kind == Kind::OpenGauss {
            return format!("{}:{}", self.last_xid[node] + 1, self.last_number[node] + 1);
        }
        let ended = self.ended[node];
        let bound = 32 - ended.leading_zeros();
        let runs = (0..bound).filter(|xid| ended & (1 << xid) == 0);
        let runs: Vec<_> = runs.map(|xid| xid.to_string()).collect();
        format!("{bound}:{}", runs.join(","))
    }

    /// Clients that hold an id, and whether they are prepared.
    fn holders(&self, node: usize) -> Vec<(usize, bool)> {
        let mut holders = Vec::new();
        for (number, client) in self.clients.iter().enumerate() {
            let here = client.legs.iter().filter(|leg| leg.node == node);
            let holds = |leg: &&Leg| leg.stage > Stage::Idle && leg.stage < Stage::Done;
            holders.extend(here.filter(holds).map(|leg| {
                let prepared = client.way != Way::OneByOne && leg.stage > Stage::Holds;
                (number, prepared)
            }));
        }
        holders
    }

    /// All that may happen now.
    fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        for (number, client) in self.clients.iter().enumerate() {
            let legs = 0..client.legs.len();
            let legs = legs.filter_map(|leg| Some((leg, client.next(leg, self.kind)?)));
            moves.extend(legs.map(|(leg, stage)| Move::Client(number, leg, stage)));
        }
        let asked = self.pending.iter().enumerate();
        let asked = asked.filter(|(_, pending)| pending.request.is_some() && !pending.ready);
        moves.extend(asked.map(|(node, _)| Move::Node(node)));
        moves
    }

    /// Whether a transaction is in half of the point, and not listed in it.
    fn has_torn(&self, proved: &Proved) -> bool {
        let listed = |client: usize| {
            let prepared = proved
                .in_doubt
                .iter()
                .filter_map(|(_, it)| it.prepared.as_ref());
            prepared
                .into_iter()
                .any(|prepared| prepared.gid == client.to_string())
        };
        let mut clients = self.clients.iter().enumerate();
        clients.any(|(number, client)| client.is_torn() && !listed(number))
    }

    /// The node does one thing of what it was asked.
    fn grant(&mut self, node: usize, without: Without) {
        let (holders, snapshot) = (self.holders(node), self.snapshot(node));
        let pending = &mut self.pending[node];
        match pending.request {
            Some(Request::Mark) => {
                self.marked[node] = true;
                pending.ready = true;
            }
            Some(Request::Holders) => {
                pending.holders = Some(holders);
                pending.ready = true;
            }
            Some(Request::Snapshot) => {
                pending.snapshot = Some(snapshot);
                pending.ready = true;
            }
            Some(Request::Both) => {
                let holders_now = match without {
                    Without::Order => pending.snapshot.is_some(),
                    _ => pending.holders.is_none(),
                };
                if holders_now {
                    pending.holders = Some(holders);
                } else {
                    pending.snapshot = Some(snapshot);
                }
                pending.ready = pending.holders.is_some() && pending.snapshot.is_some();
            }
            None => panic!("nothing was asked"),
        }
    }
}

/// Two states of the same digest would be taken for one; with 64 bits and a million states that is no worry.
fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

struct ModelNode {
    number: usize,
    without: Without,
    world: Rc<RefCell<World>>,
}

impl ModelNode {
    async fn ask(&self, request: Request) -> Pending {
        self.world.borrow_mut().pending[self.number] = Pending {
            request: Some(request),
            ..Pending::default()
        };
        std::future::poll_fn(|_| {
            let mut world = self.world.borrow_mut();
            if !world.pending[self.number].ready {
                return Poll::Pending;
            }
            let answer = std::mem::take(&mut world.pending[self.number]);
            world.told[self.number] = digest(&(world.told[self.number], &answer));
            Poll::Ready(answer)
        })
        .await
    }

    fn holder(&self, client: usize, prepared: bool) -> XidHolder {
        let in_doubt = self.world.borrow().clients[client].way == Way::InDoubt;
        XidHolder {
            pid: None,
            application: None,
            state: None,
            database: None,
            age_ms: Some(if in_doubt { 10_000 } else { 1 }),
            prepared: prepared.then(|| PreparedAs {
                gid: client.to_string(),
                owner: String::new(),
            }),
        }
    }
}

impl Node for ModelNode {
    fn name(&self) -> String {
        self.number.to_string()
    }

    async fn observe(&self, look: Look) -> Result<Observed, ApiError> {
        let request = match look {
            Look::Holders => Request::Holders,
            Look::Snapshot => Request::Snapshot,
            Look::HoldersThenSnapshot => Request::Both,
        };
        let seen = self.ask(request).await;
        let deaf = match self.without {
            Without::N1 => look == Look::Holders,
            Without::N2 => look == Look::HoldersThenSnapshot,
            Without::N1AndN2 => true,
            Without::Nothing | Without::Snapshots | Without::Order => false,
        };
        let holders = seen.holders.map(|holders| {
            let all = holders.into_iter().filter(|_| !deaf);
            let oldest: Vec<_> = all
                .map(|(client, prepared)| self.holder(client, prepared))
                .collect();
            XidHolders {
                total: oldest.len() as u64,
                oldest,
            }
        });
        let blind = self.without == Without::Snapshots;
        Ok(Observed {
            holders,
            snapshot: seen
                .snapshot
                .map(|text| if blind { String::new() } else { text }),
            session: 1,
            at: Timestamp::UNIX_EPOCH,
            took_us: 0,
        })
    }

    async fn mark(&self, restore_point: String) -> Result<MarkResult, ApiError> {
        self.ask(Request::Mark).await;
        Ok(MarkResult {
            restore_point,
            end_lsn: String::new(),
            timeline: 1,
            made: Timestamp::UNIX_EPOCH,
        })
    }

    async fn flush(&self, _: String) -> Result<(), ApiError> {
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Move {
    Client(usize, usize, Stage),
    Node(usize),
}

/// Plays `moves` from the start. The world they lead to, and how the proof ended, if it has.
fn play(
    start: &World,
    moves: &[Move],
    without: Without,
    rules: &Rules,
) -> (World, Option<Result<Proved, Obstacle>>) {
    let world = Rc::new(RefCell::new(start.clone()));
    let node = |number| ModelNode {
        number,
        without,
        world: Rc::clone(&world),
    };
    let nodes: Vec<_> = (0..start.marked.len()).map(node).collect();
    let nothing = std::future::ready(Ok(()));
    let mut proof = std::pin::pin!(attempt(&nodes, rules, 1, nothing));
    let mut cx = Context::from_waker(Waker::noop());
    let mut ended = match proof.as_mut().poll(&mut cx) {
        Poll::Ready(outcome) => Some(outcome.map(|(proved, ())| proved)),
        Poll::Pending => None,
    };
    for step in moves {
        match *step {
            Move::Client(client, leg, stage) => {
                world.borrow_mut().client_moves(client, leg, stage);
            }
            Move::Node(node) => {
                world.borrow_mut().grant(node, without);
                if let Poll::Ready(outcome) = proof.as_mut().poll(&mut cx) {
                    ended = Some(outcome.map(|(proved, ())| proved));
                }
            }
        }
    }
    let world = world.borrow().clone();
    (world, ended)
}

#[derive(Debug, Default)]
struct Found {
    states: usize,
    stands: usize,
    torn: Option<Vec<Move>>,
}

/// Tries every order, until a point that stands is torn.
fn explore(
    kind: Kind,
    clients: &[Client],
    nodes: usize,
    without: Without,
    accept_in_doubt: bool,
) -> Found {
    let rules = Rules {
        retries: 0,
        timeout: std::time::Duration::ZERO,
        accept_in_doubt,
    };
    let start = World::new(kind, clients, nodes);
    let (mut found, mut seen) = (Found::default(), HashSet::new());
    let mut open = vec![(Vec::new(), play(&start, &[], without, &rules).0)];
    while let Some((path, world)) = open.pop() {
        found.states += 1;
        for step in world.moves() {
            let mut next = world.clone();
            match step {
                Move::Client(client, leg, stage) => next.client_moves(client, leg, stage),
                Move::Node(node) => next.grant(node, without),
            }
            if !seen.insert(digest(&next)) {
                continue;
            }
            let path = [path.as_slice(), &[step]].concat();
            if let Move::Client(..) = step {
                open.push((path, next));
                continue;
            }
            // The proof may go on: only the whole story leads it to where it stands.
            match play(&start, &path, without, &rules) {
                (world, None) => open.push((path, world)),
                (_, Some(Err(_))) => {}
                (world, Some(Ok(proved))) => {
                    found.stands += 1;
                    if world.has_torn(&proved) {
                        found.torn = Some(path);
                        return found;
                    }
                }
            }
        }
    }
    found
}

/// A client of two nodes, and one of the second only: whose end raises the bound of its snapshots.
fn two_clients() -> [Client; 2] {
    [
        Client::new(Way::TwoPhase, &[0, 1]),
        Client::new(Way::OneByOne, &[1]),
    ]
}

#[test]
fn what_the_proof_says_stands_is_never_torn() {
    let cases: [(&[Client], usize); 3] = [
        (&two_clients(), 2),
        (
            &[
                Client::new(Way::OneByOne, &[1, 0]),
                Client::new(Way::OneByOne, &[0]),
            ],
            2,
        ),
        (&[Client::new(Way::TwoPhase, &[0, 1, 2])], 3),
    ];
    for (clients, nodes) in cases {
        let found = explore(Kind::PostgreSql, clients, nodes, Without::Nothing, false);
        assert!(found.torn.is_none(), "{found:?}");
        assert!(found.stands > 0 && found.states > 500, "{found:?}");
    }
    // One more event in each commit: one client at a time, or it takes minutes.
    for way in [Way::TwoPhase, Way::OneByOne] {
        let client = [Client::new(way, &[1, 0])];
        let found = explore(Kind::OpenGauss, &client, 2, Without::Nothing, false);
        assert!(found.torn.is_none() && found.stands > 0, "{found:?}");
    }
}

#[test]
fn each_part_of_the_proof_is_needed() {
    for without in [
        Without::Snapshots,
        Without::N2,
        Without::N1AndN2,
        Without::Order,
    ] {
        let found = explore(Kind::PostgreSql, &two_clients(), 2, without, false);
        assert!(
            found.torn.is_some(),
            "nothing torn without {without:?}: {found:?}"
        );
    }
}

/// N1 spares restore points that could not stand; N2 and the snapshots would find the same.
#[test]
fn the_first_look_at_holders_is_an_early_one() {
    let client = [Client::new(Way::TwoPhase, &[0, 1])];
    let found = explore(Kind::PostgreSql, &client, 2, Without::N1, false);
    assert!(found.torn.is_none() && found.stands > 0, "{found:?}");
}

/// Its snapshots show a commit before its record is written: one that was numbered before S1, and written after the mark, is
/// seen by N1 alone.
#[test]
fn on_opengauss_the_first_look_at_holders_is_part_of_the_proof() {
    for without in [Without::N1, Without::Snapshots] {
        // Its snapshots have no bound that another client would have to raise.
        let client = [Client::new(Way::TwoPhase, &[0, 1])];
        let found = explore(Kind::OpenGauss, &client, 2, without, false);
        assert!(
            found.torn.is_some(),
            "nothing torn without {without:?}: {found:?}"
        );
    }
}

#[test]
fn a_transaction_in_doubt_is_refused_or_listed() {
    let clients = [
        Client::new(Way::InDoubt, &[0, 1]),
        Client::new(Way::OneByOne, &[0]),
    ];
    let explore = |accept| explore(Kind::PostgreSql, &clients, 2, Without::Nothing, accept);
    let (refused, listed) = (explore(false), explore(true));
    assert!(refused.torn.is_none(), "{refused:?}");
    assert!(listed.torn.is_none(), "{listed:?}");
    assert!(listed.stands > refused.stands, "{refused:?} {listed:?}");
}
