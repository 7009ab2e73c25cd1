//! `gs_pitr metadata`: what the proxies know now against what was kept with a point, and bringing that back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use agent_api::Secret;
use catalog::model::LeaseScope;
use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::{ProxyArgs, private_file};
use crate::failure::{Failure, Result};
use crate::importing::Importing;
use crate::journalled::{self, Journalled};
use crate::leased::Leased;
use crate::operations::Live;
use crate::printer::Printer;
use crate::settings::{Options, Settings};
use crate::{consent, repo, signals};

/// A file of secrets is no larger.
const LONGEST: u64 = 1 << 20;

/// `gs_pitr metadata`
#[derive(Debug, Args)]
pub(crate) struct MetadataArgs {
    /// The point's id, or the beginning of one that is unique
    point: String,
    /// Drop the databases that differ from the point's at the proxies, and import those of the point
    #[arg(long)]
    import: bool,
    #[command(flatten)]
    secrets: SecretsArgs,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// Where secrets are that are not stored.
#[derive(Debug, Clone, Args)]
pub(crate) struct SecretsArgs {
    /// File (mode 0600) with a line NAME=SECRET for each secret of the metadata that the proxies do not know any more
    #[arg(
        long,
        env = "GS_PITR_METADATA_SECRETS",
        hide_env_values = true,
        value_name = "FILE"
    )]
    metadata_secrets: Option<PathBuf>,
}

impl SecretsArgs {
    /// The secrets, by the names of their placeholders.
    ///
    /// # Errors
    /// A file that others may read, or nobody can; a line without a name.
    pub(crate) fn read(&self) -> Result<BTreeMap<String, Secret>> {
        let Some(path) = &self.metadata_secrets else {
            return Ok(BTreeMap::new());
        };
        let text = private_file(path, "--metadata-secrets", LONGEST)?;
        let lines = text.lines().enumerate();
        let lines = lines.filter(|(_, line)| !line.trim().is_empty());
        let read = lines.map(|(number, line)| match line.split_once('=') {
            Some((name, secret)) if !name.is_empty() => {
                Ok((name.to_owned(), Secret(secret.to_owned())))
            }
            _ => {
                let message = format!(
                    "line {} of `{}` is not NAME=SECRET",
                    number + 1,
                    path.display()
                );
                Err(Failure::usage(message))
            }
        });
        read.collect()
    }
}

impl MetadataArgs {
    /// What the command's own flags say.
    pub(crate) fn options(&self) -> Options {
        Options::from(&self.proxy)
    }
}

/// Runs the command.
pub(crate) async fn run(args: &MetadataArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    if args.import {
        consent::possible(settings)?;
    }
    let told = args.secrets.read()?;
    let access = args.proxy.needed(settings, printer)?;
    let (live, cancel, operation) = (Live::default(), CancellationToken::new(), Uuid::now_v7());
    let work = async {
        let catalog = repo::open(settings).await?;
        let point = catalog.resolve_point_id(&args.point).await?;
        let importing = Importing {
            catalog: &catalog,
            access: &access,
            printer,
            cancel: &cancel,
        };
        let Some(compared) = importing.compared(&point).await? else {
            let message = format!("no metadata of proxies were kept with point {point}");
            return Err(Failure::new(agent_api::ErrorKind::NotFound, message));
        };
        compared.tell(args.import, printer);
        let mut fields = compared.fields();
        fields["imported"] = json!([]);
        if args.import && compared.differences.to_import().next().is_some() {
            let nobody = Failure::usage("there is nobody to ask").next("use `--yes`");
            let question = "Drop these databases at the proxies, and import them as they were?";
            consent::agreed(question, nobody, settings, printer, &cancel).await?;
            let command = "gs_pitr metadata";
            let scope = LeaseScope::Restore;
            let leased = Leased::take(
                &catalog, scope, operation, command, settings, printer, &cancel,
            );
            let leased = leased.await?;
            let journalled = Journalled {
                operation,
                kind: "metadata",
                backup: None,
                by: journalled::ourselves(command),
            };
            let work = async |journal: &_| importing.import(&compared, told.clone(), journal).await;
            let imported = journalled.run(&catalog, printer, None, work).await;
            leased.release().await;
            let imported = imported?;
            printer.text(&format!("imported: {}", imported.join(", ")));
            fields["imported"] = json!(imported);
        }
        printer.result("metadata", fields);
        Ok(())
    };
    let work = Box::pin(work);
    signals::guarded(operation, settings, printer, &live, &cancel, work).await
}
