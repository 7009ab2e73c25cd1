//! One client's session: the simple and the extended protocol.
//!
//! As the real one does, it collects the messages of the extended protocol until Sync or Flush and then works them off together: that
//! is where three or more executions of one statement are taken for a batch.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;

use super::Frontend;
use super::batch;
use super::execute::{Command, Context, Reply};
use super::instance::Instance;
use super::login::Client;
use super::node::Values;
use super::wire::{self, Bind, Parse, Refusal, Replies, Request, Stream};

/// A prepared statement.
pub(super) struct Prepared {
    pub command: Command,
    pub sql: String,
    /// As the client gave them, 0 for unknown, or as a node described them.
    types: Mutex<Vec<u32>>,
}

impl Prepared {
    pub(super) fn types(&self) -> Vec<u32> {
        self.types.lock().expect("no panic").clone()
    }

    /// Learns the types from the body of a `ParameterDescription`.
    fn learn(&self, described: &Bytes) {
        let all = described.get(2..).unwrap_or_default().chunks_exact(4);
        let all = all.map(|kind| {
            kind.iter()
                .fold(0, |kind, byte| kind << 8 | u32::from(*byte))
        });
        *self.types.lock().expect("no panic") = all.collect();
    }
}

/// A portal, executed when it was bound, as in the real one.
struct Portal {
    reply: Reply,
    sent: usize,
}

/// A session.
pub(super) struct Session {
    stream: Box<dyn Stream>,
    context: Context,
    prepared: HashMap<String, Arc<Prepared>>,
    portals: HashMap<String, Portal>,
    /// Messages of the extended protocol that wait for Sync or Flush.
    pending: Vec<Request>,
    /// After an error: everything up to the next Sync is skipped.
    skipping: bool,
    out: Replies,
}

/// What became of a message.
enum Next {
    GoOn,
    HangUp,
}

impl Session {
    pub(super) fn new(proxy: Arc<Instance>, stream: Box<dyn Stream>, client: Client) -> Self {
        let gauss = proxy.frontend == Frontend::OpenGaussSha256;
        Self {
            stream,
            context: Context::new(proxy, client),
            prepared: HashMap::new(),
            portals: HashMap::new(),
            pending: Vec::new(),
            skipping: false,
            out: Replies::new(gauss),
        }
    }

    /// Serves the client until it goes away.
    pub(super) async fn run(mut self) -> io::Result<()> {
        while let Some(request) = wire::read(&mut *self.stream).await? {
            self.context.proxy.thawed().await;
            let next = match request {
                Request::Query(sql) => self.simple(&sql).await,
                Request::Sync | Request::Flush => self.work_off(request).await,
                Request::Terminate => break,
                Request::Password(_) | Request::Other => {
                    let message = "Unsupported command of the protocol.";
                    self.fail(&Refusal::system(message));
                    Next::GoOn
                }
                extended => {
                    self.pending.push(extended);
                    continue;
                }
            };
            if matches!(next, Next::HangUp) {
                break;
            }
            self.context.proxy.thawed().await;
            self.stream.write_all_buf(&mut self.out.bytes).await?;
            self.stream.flush().await?;
        }
        Ok(())
    }

    fn ready(&mut self) {
        let status = if self.context.transaction.is_some() {
            b'T'
        } else {
            b'I'
        };
        self.out.ready(status);
    }

    /// The real one says "failed transaction" after every error in one, also where it goes on.
    fn fail(&mut self, refusal: &Refusal) {
        self.out.refusal(refusal);
        let status = if self.context.transaction.is_some() {
            b'E'
        } else {
            b'I'
        };
        self.out.ready(status);
    }

    async fn simple(&mut self, sql: &str) -> Next {
        let command = match Command::parse(sql, self.context.proxy.version) {
            Ok(command) => command,
            Err(refusal) => {
                self.fail(&refusal);
                return Next::GoOn;
            }
        };
        // What is refused before it is executed leaves the transaction as it was.
        let admitted = match self.context.known(&command).await {
            Ok(()) => self.context.admit(&command),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = admitted {
            self.fail(&refusal);
            return Next::GoOn;
        }
        match self.context.run(&command, None).await {
            Ok(reply) if reply.hang_up => return Next::HangUp,
            Ok(reply) => {
                if let Some(columns) = &reply.columns {
                    self.out.message(b'T', columns);
                }
                for row in &reply.rows {
                    self.out.message(b'D', row);
                }
                self.end(&reply);
                self.ready();
            }
            Err(refusal) => {
                self.context.mark_failed(&refusal);
                self.fail(&refusal);
            }
        }
        Next::GoOn
    }

    /// The end of a statement's answer. The settings come after it.
    fn end(&mut self, reply: &Reply) {
        if reply.empty {
            return self.out.message(b'I', &[]);
        }
        self.out.complete(&reply.tag);
        for (name, value) in &reply.settings {
            self.out.parameter(name, value);
        }
    }

    /// Works off what has been collected.
    async fn work_off(&mut self, end: Request) -> Next {
        let pending = mem::take(&mut self.pending);
        let syncs = matches!(end, Request::Sync);
        let start = self.out.bytes.len();
        if !self.skipping {
            match self.all(&pending).await {
                Ok(Next::HangUp) => return Next::HangUp,
                Ok(Next::GoOn) => {}
                Err(refusal) => {
                    // Here also what the lock refuses is an error of the transaction.
                    self.context.mark_failed(&refusal);
                    // Nothing that went well before it is told, ParseComplete neither.
                    self.out.bytes.truncate(start);
                    if syncs {
                        self.fail(&refusal);
                        return Next::GoOn;
                    }
                    self.out.refusal(&refusal);
                    self.skipping = true;
                }
            }
        }
        if syncs {
            self.skipping = false;
            self.ready();
        }
        Next::GoOn
    }

    async fn all(&mut self, pending: &[Request]) -> Result<Next, Refusal> {
        let batch = batch::find(pending);
        let mut at = 0;
        while let Some(request) = pending.get(at) {
            if let Some(range) = batch.clone()
                && range.start == at
            {
                self.batch(&pending[range.clone()]).await?;
                at = range.end;
                continue;
            }
            if matches!(self.one(request).await?, Next::HangUp) {
                return Ok(Next::HangUp);
            }
            at += 1;
        }
        Ok(Next::GoOn)
    }

    async fn one(&mut self, request: &Request) -> Result<Next, Refusal> {
        match request {
            Request::Parse(parse) => self.parse(parse).await?,
            Request::Bind(bind) => return self.bind(bind).await,
            Request::Describe {
                statement: true,
                name,
            } => self.describe(name).await?,
            Request::Describe { name, .. } => {
                let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
                match portal.reply.columns.clone() {
                    Some(columns) => self.out.message(b'T', &columns),
                    None => self.out.message(b'n', &[]),
                }
            }
            Request::Execute { portal, rows } => self.execute(portal, *rows)?,
            Request::Close { statement, name } => {
                if *statement {
                    self.prepared.remove(name);
                } else {
                    self.portals.remove(name);
                }
                self.out.message(b'3', &[]);
            }
            _ => {}
        }
        Ok(Next::GoOn)
    }

    async fn parse(&mut self, parse: &Parse) -> Result<(), Refusal> {
        let command = Command::parse(&parse.sql, self.context.proxy.version)?;
        self.context.known(&command).await?;
        let prepared = Prepared {
            command,
            sql: parse.sql.clone(),
            types: Mutex::new(parse.types.clone()),
        };
        self.prepared.insert(parse.name.clone(), Arc::new(prepared));
        self.out.message(b'1', &[]);
        Ok(())
    }

    fn statement(&self, name: &str) -> Result<Arc<Prepared>, Refusal> {
        let message = || format!("prepared statement \"{name}\" does not exist");
        let found = self.prepared.get(name).cloned();
        found.ok_or_else(|| Refusal::new("26000", message()))
    }

    async fn bind(&mut self, bind: &Bind) -> Result<Next, Refusal> {
        let prepared = self.statement(&bind.statement)?;
        self.context.admit(&prepared.command)?;
        let values = Values {
            types: prepared.types(),
            bind: bind.clone(),
        };
        let reply = self.context.run(&prepared.command, Some(&values)).await?;
        if reply.hang_up {
            return Ok(Next::HangUp);
        }
        let portal = Portal { reply, sent: 0 };
        self.portals.insert(bind.portal.clone(), portal);
        self.out.message(b'2', &[]);
        Ok(Next::GoOn)
    }

    async fn describe(&mut self, name: &str) -> Result<(), Refusal> {
        let prepared = self.statement(name)?;
        let answer = self.context.describe(&prepared).await?;
        let parameters = answer.parameters.unwrap_or(Bytes::from_static(&[0, 0]));
        prepared.learn(&parameters);
        self.out.message(b't', &parameters);
        match answer.columns {
            Some(columns) => self.out.message(b'T', &columns),
            None => self.out.message(b'n', &[]),
        }
        Ok(())
    }

    fn execute(&mut self, name: &str, rows: usize) -> Result<(), Refusal> {
        let mut portal = self.portals.remove(name).ok_or_else(|| no_portal(name))?;
        let left = &portal.reply.rows[portal.sent..];
        let count = if rows == 0 {
            left.len()
        } else {
            rows.min(left.len())
        };
        for row in &left[..count] {
            self.out.message(b'D', row);
        }
        portal.sent += count;
        if portal.sent < portal.reply.rows.len() {
            self.out.message(b's', &[]);
        } else {
            self.end(&portal.reply);
        }
        self.portals.insert(name.to_owned(), portal);
        Ok(())
    }

    /// A batch: here nobody asks for the cluster's state.
    async fn batch(&mut self, requests: &[Request]) -> Result<(), Refusal> {
        let binds: Vec<&Bind> = requests
            .iter()
            .filter_map(|request| match request {
                Request::Bind(bind) => Some(bind),
                _ => None,
            })
            .collect();
        let Some(first) = binds.first() else {
            return Ok(());
        };
        let prepared = self.statement(&first.statement)?;
        let total = self.context.batch(&prepared, &binds).await?;
        for request in requests {
            match request {
                Request::Bind(_) => self.out.message(b'2', &[]),
                Request::Describe { .. } => self.out.message(b'n', &[]),
                Request::Execute { .. } => {
                    let tag = prepared.command.batch_tag(total / binds.len() as u64);
                    self.out.complete(&tag);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn no_portal(name: &str) -> Refusal {
    Refusal::new("34000", format!("portal \"{name}\" does not exist"))
}
