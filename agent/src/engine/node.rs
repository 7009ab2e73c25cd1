//! The node as it is before anything is changed on it.

use std::path::{Path, PathBuf};

use agent_api::{ApiError, ErrorKind};
use agent_sql::{ConnectOptions, NodeConnection, ServerFacts, Severity};
use agent_wal::SegmentSize;
use agent_wal::control::ControlFile;
use catalog::model::Attachment;

use super::attachments::{self, ConfigFiles};
use super::control;
use super::direct::walk::{Source, TablespaceList};
use super::slot;
use crate::database::connect_options;
use crate::engine::errors;
use crate::operation::OperationContext;

/// The node beside the agent, looked at.
#[derive(Debug)]
pub struct Node {
    /// How to log in again.
    pub options: ConnectOptions,
    /// The session that everything but the backup itself goes through.
    pub sql: NodeConnection,
    /// What the server says of itself.
    pub facts: ServerFacts,
    /// The control file.
    pub control: ControlFile,
    /// Its data directory.
    pub pgdata: PathBuf,
    /// Configuration from outside it.
    pub attachments: Vec<Attachment>,
    /// Arguments it was started with.
    pub argv: Vec<String>,
}

/// What is read of a data directory before a backup begins.
#[derive(Debug)]
pub struct Looked {
    /// The data directory, links followed.
    pub pgdata: PathBuf,
    /// Its control file.
    pub control: ControlFile,
    /// Configuration from outside it.
    pub attachments: Vec<Attachment>,
    /// Arguments that the server was started with.
    pub argv: Vec<String>,
}

impl Looked {
    /// Reads it. `configured` is the data directory that the agent was told, `facts` what the server says.
    /// Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Database`] if the server's data directory is not that one, is not on this host, or
    /// cannot be read.
    pub fn read(configured: Option<&Path>, facts: &ServerFacts) -> Result<Self, ApiError> {
        let pgdata = data_directory(configured, Path::new(&facts.data_directory))?;
        let control = control::read(&pgdata).map_err(errors::copy)?.parsed;
        if control.system_identifier != facts.system_identifier {
            return Err(elsewhere(&pgdata));
        }
        let absolute = |path: &str| pgdata.join(path);
        let files = &facts.files;
        let config = ConfigFiles {
            config: absolute(&files.config_file),
            hba: absolute(&files.hba_file),
            ident: absolute(&files.ident_file),
            sources: files.sources.iter().map(|path| absolute(path)).collect(),
        };
        let attachments = attachments::find(&pgdata, &config).map_err(errors::copy)?;
        let opts = std::fs::read(pgdata.join("postmaster.opts")).unwrap_or_default();
        let argv = attachments::argv(&String::from_utf8_lossy(&opts));
        Ok(Self {
            pgdata,
            control,
            attachments,
            argv,
        })
    }
}

/// Whether a WAL segment fits in `memory` bytes: it is verified in memory before it is sent, and read back whole.
///
/// # Errors
/// [`ErrorKind::Usage`] with the setting that would do.
pub fn fits_memory(facts: &ServerFacts, memory: u64) -> Result<(), ApiError> {
    if facts.wal_segment_size <= memory / 2 {
        return Ok(());
    }
    let mib = facts.wal_segment_size >> 20;
    let message = format!("WAL segments of {mib} MiB do not fit in the agent's memory budget");
    Err(ApiError::new(ErrorKind::Usage, message)
        .next(format!("start the agent with --memory {}", 2 * mib + 64)))
}

impl Node {
    /// Logs in and looks. Changes nothing.
    ///
    /// # Errors
    /// Whatever stands in the way of a backup, with what mends it.
    pub async fn open(cx: &OperationContext) -> Result<Self, ApiError> {
        let options = connect_options(&cx.config, &slot::session_name(cx.id))?;
        let sql = NodeConnection::connect(&options, cx.cancel.clone())
            .await
            .map_err(errors::sql)?;
        for finding in sql.preflight().await.map_err(errors::sql)? {
            match finding.severity {
                Severity::Fine => {}
                Severity::Refusal => {
                    let refused = ApiError::new(ErrorKind::Database, finding.what);
                    return Err(match finding.mend {
                        Some(mend) => refused.next(mend),
                        None => refused,
                    });
                }
                Severity::Warning => cx.report.warning(match finding.mend {
                    Some(mend) => format!("{} ({mend})", finding.what),
                    None => finding.what,
                }),
            }
        }
        Self::read(cx, options, sql).await
    }

    /// Logs in and reads what a restore point needs, for a node that was backed up before: what stands in the way of a
    /// backup was said then. Changes nothing.
    ///
    /// # Errors
    /// If it is a standby, or another database than the agent was told.
    pub async fn look(cx: &OperationContext) -> Result<Self, ApiError> {
        let options = connect_options(&cx.config, "gs_pitr point")?;
        let sql = NodeConnection::connect(&options, cx.cancel.clone())
            .await
            .map_err(errors::sql)?;
        Self::read(cx, options, sql).await
    }

    async fn read(
        cx: &OperationContext,
        options: ConnectOptions,
        sql: NodeConnection,
    ) -> Result<Self, ApiError> {
        let facts = sql.server_facts().await.map_err(errors::sql)?;
        if facts.in_recovery {
            let message = "the database is a standby or still recovering";
            return Err(ApiError::new(ErrorKind::Database, message)
                .next("name the agent of this shard's primary"));
        }
        fits_memory(&facts, cx.budget.total_bytes() as u64)?;
        let (configured, about) = (cx.config.pgdata.clone(), facts.clone());
        let looked =
            tokio::task::spawn_blocking(move || Looked::read(configured.as_deref(), &about));
        let Looked {
            pgdata,
            control,
            attachments,
            argv,
        } = looked.await.map_err(errors::internal)??;
        Ok(Self {
            options,
            sql,
            facts,
            control,
            pgdata,
            attachments,
            argv,
        })
    }

    /// WAL segment size.
    #[must_use]
    pub fn segment_size(&self) -> SegmentSize {
        self.control.wal_segment_size
    }

    /// What is to be walked. Blocks; call it when the backup has begun.
    ///
    /// # Errors
    /// If `pg_tblspc` cannot be read.
    pub fn source(&self) -> Result<Source, super::copy_error::CopyError> {
        let stats_temp = self.facts.files.stats_temp_directory.as_deref();
        let stats_temp = stats_temp.and_then(|path| {
            let path = self.pgdata.join(path);
            let inside = path.strip_prefix(&self.pgdata).ok()?;
            Some(inside.to_str()?.trim_end_matches('/').to_owned())
        });
        Ok(Source {
            pgdata: self.pgdata.clone(),
            version_directory: format!("PG_{}_{}", self.sql.major(), self.control.catalog_version),
            tablespaces: TablespaceList::read(&self.pgdata)?,
            stats_temp,
        })
    }
}

/// The server's data directory, which must be the one the agent was told, if it was told one.
pub(crate) fn data_directory(
    configured: Option<&Path>,
    server: &Path,
) -> Result<PathBuf, ApiError> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| {
            let message = format!(
                "cannot read the data directory `{}`: {error}",
                path.display()
            );
            ApiError::new(ErrorKind::Database, message).next(
                "run the agent on the database's host, as the user that owns the data directory",
            )
        })
    };
    let real_server = real(server)?;
    if let Some(configured) = configured
        && real(configured)? != real_server
    {
        let message = format!(
            "the database's data directory is `{}`, and the agent was told `{}`",
            server.display(),
            configured.display()
        );
        return Err(ApiError::new(ErrorKind::Database, message)
            .next("mend --pgdata, or --pg-host and --pg-port, of the agent"));
    }
    Ok(real_server)
}

/// The data directory is another database's.
pub(crate) fn elsewhere(pgdata: &Path) -> ApiError {
    let message = format!(
        "`{}` on this host belongs to another database than the one that answers",
        pgdata.display()
    );
    ApiError::new(ErrorKind::Database, message)
        .next("run the agent on the database's host; mend its --pg-host and --pg-port")
}
