//! A bucket for a whole test: the stand-in in memory, or a real MinIO.

use std::sync::Arc;

use catalog::Catalog;
use catalog::model::{Manifest, Point};
use pipeline::store::ObjectStore;
use pipeline::store::s3::{S3Config, S3Store};

use crate::minio::{self, Minio};
use crate::s3::{self, Options, S3Server};
use crate::versitygw::{self, Versitygw};

/// One of both, over TLS.
#[derive(Debug)]
pub enum Bucket {
    /// The stand-in.
    Double(S3Server),
    /// The real one.
    Minio(Minio),
    /// Another real one.
    Versitygw(Versitygw),
}

impl Bucket {
    /// The stand-in, in this process.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn double() -> Self {
        let options = Options {
            tls: true,
            ..Options::default()
        };
        Self::Double(s3::start(options).await.expect("the stand-in starts"))
    }

    /// A real MinIO, if there is one here.
    pub async fn minio() -> Option<Self> {
        minio::start(true).await.map(Self::Minio)
    }

    /// A real versitygw, if the environment names one.
    pub async fn versitygw() -> Option<Self> {
        versitygw::start(true).await.map(Self::Versitygw)
    }

    /// MinIO if it is here, else the stand-in.
    pub async fn best() -> Self {
        match Self::minio().await {
            Some(minio) => minio,
            None => Self::double().await,
        }
    }

    /// What it is, for people.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Double(_) => "the in-memory S3 server of tests/support (a stand-in)",
            Self::Minio(_) => "a real MinIO",
            Self::Versitygw(_) => "a real versitygw",
        }
    }

    /// How to reach it, with a prefix in its bucket.
    pub fn config(&self) -> S3Config {
        let config = match self {
            Self::Double(server) => server.config(),
            Self::Minio(minio) => minio.config(),
            Self::Versitygw(gateway) => gateway.config(),
        };
        S3Config {
            prefix: "clusters/one".into(),
            ..config
        }
    }

    /// A store on it.
    ///
    /// # Panics
    /// If its configuration is refused.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::new(S3Store::new(self.config()).expect("a store"))
    }

    /// What the repository says of a backup.
    ///
    /// # Panics
    /// If it lacks the backup or its point.
    pub async fn recorded(&self, id: &str) -> (Manifest, Point) {
        let catalog = Catalog::open(self.store()).await.expect("a repository");
        let manifest = catalog.manifest(&id.parse().expect("an id")).await;
        let manifest = manifest.expect("a manifest");
        let point = manifest.point.as_ref().expect("a point");
        let point = catalog.point(point).await.expect("the point");
        (manifest, point)
    }

    /// The stand-in, for faults and damage.
    ///
    /// # Panics
    /// If it is a real MinIO.
    pub fn server(&self) -> &S3Server {
        match self {
            Self::Double(server) => server,
            Self::Minio(_) | Self::Versitygw(_) => panic!("a real server takes no orders"),
        }
    }

    /// Multipart uploads neither completed nor aborted. `None`: a real MinIO lists them by exact key only.
    pub fn uploads_under_way(&self) -> Option<usize> {
        match self {
            Self::Double(server) => Some(server.uploads_under_way()),
            Self::Minio(_) | Self::Versitygw(_) => None,
        }
    }
}
