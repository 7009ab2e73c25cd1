//! What a call on the mount is answered, and why a copy came to nothing.

use pipeline::error::PipelineError;
use rustix::io::Errno;

/// What a call is answered. The program that called sees its [`FsError::errno`]; the reason, where there is more to say,
/// is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// `ENOENT`.
    #[error("no such file or directory")]
    NotFound,
    /// `EEXIST`.
    #[error("it exists")]
    Exists,
    /// `ENOTEMPTY`.
    #[error("the directory is not empty")]
    NotEmpty,
    /// `ENOTDIR`.
    #[error("not a directory")]
    NotDirectory,
    /// `EISDIR`.
    #[error("a directory")]
    IsDirectory,
    /// `EBADF`: no such handle, or one that was opened for something else.
    #[error("not a handle for this")]
    BadHandle,
    /// `EROFS`: it belongs to another backup, which is finished.
    #[error("read-only")]
    ReadOnly,
    /// `ENAMETOOLONG`: more than 255 bytes.
    #[error("the name is too long")]
    NameTooLong,
    /// `EILSEQ`: a name that is not UTF-8 cannot stand in an index.
    #[error("the name is not UTF-8")]
    BadName,
    /// `EOPNOTSUPP`: a file system could do it, and this one does not.
    #[error("refused: {0}")]
    Refused(&'static str),
    /// `ENOSPC`: more than the memory set aside for files of this kind.
    #[error("no room")]
    NoSpace,
    /// `EFBIG`.
    #[error("the file would be too large")]
    TooLarge,
    /// `EIO`: the copy has failed, or the store has.
    #[error("input/output error")]
    Io,
}

impl FsError {
    /// The number that the program sees.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::NotFound => Errno::NOENT,
            Self::Exists => Errno::EXIST,
            Self::NotEmpty => Errno::NOTEMPTY,
            Self::NotDirectory => Errno::NOTDIR,
            Self::IsDirectory => Errno::ISDIR,
            Self::BadHandle => Errno::BADF,
            Self::ReadOnly => Errno::ROFS,
            Self::NameTooLong => Errno::NAMETOOLONG,
            Self::BadName => Errno::ILSEQ,
            Self::Refused(_) => Errno::OPNOTSUPP,
            Self::NoSpace => Errno::NOSPC,
            Self::TooLarge => Errno::FBIG,
            Self::Io => Errno::IO,
        };
        errno.raw_os_error()
    }
}

/// Why a copy came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// Packs or index could not be made or sent.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A WAL segment could not be put into the bucket, or read back from there.
    #[error("WAL segment `{segment}`: {what}")]
    Wal {
        /// Its name.
        segment: String,
        /// What is wrong.
        what: String,
    },
    /// The program did with a file what the copy cannot follow.
    #[error("the copy of `{path}` is not what the program wrote: {what}")]
    Spoiled {
        /// The file, in the catalog.
        path: String,
        /// What was done with it.
        what: &'static str,
    },
    /// The copy was to be closed while a program still wrote.
    #[error("`{path}` is still open")]
    StillOpen {
        /// The file, in the catalog.
        path: String,
    },
    /// The file system was sealed or aborted before.
    #[error("the copy is closed already")]
    Closed,
}
