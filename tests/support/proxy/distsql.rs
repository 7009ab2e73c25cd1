//! DistSQL, as far as it is imitated.

use super::sql::{self, Piece, Token};
use super::wire::Refusal;
use super::{Clock, ClusterState, DataNode, Transaction, Version};

/// What the lock wants to know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// Changes nothing.
    Query,
    Unlock,
    Import,
    /// Anything else.
    Update,
}

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DistSql {
    Lock {
        state: ClusterState,
        /// Milliseconds to wait for the internal mutex.
        timeout: Option<u64>,
    },
    Unlock {
        timeout: Option<u64>,
    },
    /// The stand-in keeps no labels.
    Label,
    ShowComputeNodes,
    ShowComputeNodeInfo,
    ShowComputeNodeMode,
    ShowStorageUnits(Option<String>),
    ShowTransactionRule,
    ShowClockRule,
    ExportMetadata,
    ExportStorageNodes(Option<String>),
    /// As it was sent: base64, one hopes.
    ImportMetadata(String),
    Refresh(Option<String>),
    /// Name, as properties are called, and value.
    SetVariable(String, String),
    AlterTransactionRule(Transaction),
    AlterClockRule(Clock),
    RegisterStorageUnits(Vec<(String, DataNode)>),
    /// Table, column, `sharding-count`.
    ShardingTableRules(Vec<(String, String, String)>),
    DropShardingTableRule(String),
}

impl DistSql {
    /// Reads `sql`; `None`: it is not DistSQL.
    pub(super) fn parse(sql: &str, version: Version) -> Option<Result<Self, Refusal>> {
        let pieces = sql::pieces(sql)?;
        let mut reader = Reader { pieces: &pieces };
        let parsed = reader.statement(version)?;
        let syntax = || {
            let message = format!("You have an error in your SQL syntax: {sql}, null");
            Refusal::new("99999", message)
        };
        Some(match parsed {
            Some(Ok(statement)) if reader.pieces.is_empty() => Ok(statement),
            Some(Err(refusal)) => Err(refusal),
            _ => Err(syntax()),
        })
    }

    pub(super) fn group(&self) -> Group {
        match self {
            Self::Unlock { .. } => Group::Unlock,
            Self::ImportMetadata(_) => Group::Import,
            Self::ShowComputeNodes
            | Self::ShowComputeNodeInfo
            | Self::ShowComputeNodeMode
            | Self::ShowStorageUnits(_)
            | Self::ShowTransactionRule
            | Self::ShowClockRule
            | Self::ExportMetadata
            | Self::ExportStorageNodes(_) => Group::Query,
            _ => Group::Update,
        }
    }

    /// Its class in the real proxy.
    pub(super) fn java(&self) -> &'static str {
        match self {
            Self::Lock { .. } => "LockClusterStatement",
            Self::Unlock { .. } => "UnlockClusterStatement",
            Self::Label => "LabelComputeNodeStatement",
            Self::ShowComputeNodes => "ShowComputeNodesStatement",
            Self::ShowComputeNodeInfo => "ShowComputeNodeInfoStatement",
            Self::ShowComputeNodeMode => "ShowComputeNodeModeStatement",
            Self::ShowStorageUnits(_) => "ShowStorageUnitsStatement",
            Self::ShowTransactionRule => "ShowTransactionRuleStatement",
            Self::ShowClockRule => "ShowGlobalClockRuleStatement",
            Self::ExportMetadata => "ExportMetaDataStatement",
            Self::ExportStorageNodes(_) => "ExportStorageNodesStatement",
            Self::ImportMetadata(_) => "ImportMetaDataStatement",
            Self::Refresh(_) => "RefreshDatabaseMetaDataStatement",
            Self::SetVariable(..) => "SetDistVariableStatement",
            Self::AlterTransactionRule(_) => "AlterTransactionRuleStatement",
            Self::AlterClockRule(_) => "AlterGlobalClockRuleStatement",
            Self::RegisterStorageUnits(_) => "RegisterStorageUnitStatement",
            Self::ShardingTableRules(_) => "CreateShardingTableRuleStatement",
            Self::DropShardingTableRule(_) => "DropShardingTableRuleStatement",
        }
    }
}

/// What a statement that begins like DistSQL turns out to be: `None` is a syntax error.
type Parsed = Option<Result<DistSql, Refusal>>;

struct Reader<'a> {
    pieces: &'a [Piece],
}

impl Reader<'_> {
    /// Takes these keywords, if they are next.
    fn words(&mut self, words: &str) -> bool {
        let words: Vec<&str> = words.split(' ').collect();
        let matches = self.pieces.len() >= words.len()
            && words.iter().zip(self.pieces).all(|(word, p)| p.is(word));
        if matches {
            self.pieces = &self.pieces[words.len()..];
        }
        matches
    }

    fn symbol(&mut self, symbol: char) -> Option<()> {
        self.next().filter(|p| p.is_symbol(symbol)).map(|_| ())
    }

    fn next(&mut self) -> Option<Piece> {
        let (first, rest) = self.pieces.split_first()?;
        self.pieces = rest;
        Some(first.clone())
    }

    fn name(&mut self) -> Option<String> {
        self.next()?.name().map(str::to_owned)
    }

    fn text(&mut self) -> Option<String> {
        self.next()?.text().map(str::to_owned)
    }

    fn statement(&mut self, version: Version) -> Option<Parsed> {
        let done = |statement| Some(Some(Ok(statement)));
        if self.words("lock cluster") {
            return Some(self.lock(version));
        }
        if self.words("unlock cluster") {
            return Some(
                self.timeout(version)
                    .map(|timeout| timeout.map(|timeout| DistSql::Unlock { timeout })),
            );
        }
        if self.words("label compute node") || self.words("relabel compute node") {
            return Some(self.label());
        }
        if self.words("show compute nodes") {
            return done(DistSql::ShowComputeNodes);
        }
        if self.words("show compute node info") {
            return done(DistSql::ShowComputeNodeInfo);
        }
        if self.words("show compute node mode") {
            return done(DistSql::ShowComputeNodeMode);
        }
        if self.words("show storage units") {
            return Some(self.from(DistSql::ShowStorageUnits));
        }
        if self.words("show transaction rule") {
            return done(DistSql::ShowTransactionRule);
        }
        if self.words("show global clock rule") {
            return done(DistSql::ShowClockRule);
        }
        if self.words("export metadata") {
            return done(DistSql::ExportMetadata);
        }
        if self.words("export storage nodes") {
            return Some(self.from(DistSql::ExportStorageNodes));
        }
        if self.words("import metadata") {
            return Some(self.text().map(DistSql::ImportMetadata).map(Ok));
        }
        self.change()
    }

    fn change(&mut self) -> Option<Parsed> {
        if self.words("refresh database metadata") || self.words("force refresh database metadata")
        {
            let name = match self.pieces {
                [] => None,
                _ => self.name(),
            };
            return Some(Some(Ok(DistSql::Refresh(name))));
        }
        if self.words("set dist variable") {
            return Some(self.variable());
        }
        if self.words("alter transaction rule") {
            return Some(self.transaction_rule());
        }
        if self.words("alter global clock rule") {
            return Some(self.clock_rule());
        }
        if self.words("register storage unit") {
            let units = self.list(Self::storage_unit);
            return Some(units.map(DistSql::RegisterStorageUnits).map(Ok));
        }
        if self.words("create sharding table rule") || self.words("alter sharding table rule") {
            let rules = self.list(Self::table_rule);
            return Some(rules.map(DistSql::ShardingTableRules).map(Ok));
        }
        if self.words("drop sharding table rule") {
            return Some(self.name().map(DistSql::DropShardingTableRule).map(Ok));
        }
        None
    }

    /// `WITH LOCK_STRATEGY(TYPE(NAME="WRITE", PROPERTIES("lock_csn"=true))) TIMEOUT 1000`.
    fn lock(&mut self, version: Version) -> Parsed {
        self.words("with lock_strategy").then_some(())?;
        let properties = self.group()?;
        let name = value(properties, "name")?.text()?;
        let state = match name.to_ascii_uppercase().as_str() {
            "WRITE" => ClusterState::ReadOnly,
            "READ_WRITE" => ClusterState::Unavailable,
            _ => {
                let cause = format!(
                    "Server exception.\nMore details: org.apache.shardingsphere.infra.spi.exception.\
                     ServiceProviderNotFoundException: SPI-00001: No implementation class load from SPI \
                     'org.apache.shardingsphere.proxy.backend.lock.spi.ClusterLockStrategy' with type '{name}'."
                );
                return Some(Err(Refusal::system(cause)));
            }
        };
        let timeout = self.timeout(version)?;
        Some(timeout.map(|timeout| DistSql::Lock { state, timeout }))
    }

    /// The form of the release: before 5.5.2 there is none, in 5.5.2 it has to be there.
    fn timeout(&mut self, version: Version) -> Option<Result<Option<u64>, Refusal>> {
        if !self.words("timeout") {
            let cause = "java.lang.NumberFormatException: Cannot parse null string";
            return Some(match version {
                Version::V5_5_2 if self.pieces.is_empty() => Err(Refusal::unknown(cause)),
                _ => Ok(None),
            });
        }
        if version == Version::V5_5_1 {
            return None;
        }
        match self.next()?.token {
            Token::Number(number) => Some(Ok(Some(number.parse().ok()?))),
            _ => None,
        }
    }

    fn variable(&mut self) -> Parsed {
        let name = self.name()?.to_ascii_lowercase().replace('_', "-");
        self.symbol('=')?;
        Some(Ok(DistSql::SetVariable(name, self.text()?)))
    }

    fn label(&mut self) -> Parsed {
        self.next()
            .filter(|p| p.name().is_some() || p.text().is_some())?;
        self.words("with").then_some(())?;
        self.name()?;
        while !self.pieces.is_empty() {
            self.symbol(',')?;
            self.name()?;
        }
        Some(Ok(DistSql::Label))
    }

    /// `FROM database`, or nothing.
    fn from(&mut self, made: fn(Option<String>) -> DistSql) -> Parsed {
        if !self.words("from") {
            return Some(Ok(made(None)));
        }
        self.name().map(|name| Ok(made(Some(name))))
    }

    /// What is in the parentheses that come next.
    fn group(&mut self) -> Option<&[Piece]> {
        let mut depth = 0;
        let end = self.pieces.iter().position(|p| {
            depth += i32::from(p.is_symbol('(')) - i32::from(p.is_symbol(')'));
            depth == 0
        })?;
        let (group, rest) = self.pieces.split_at(end + 1);
        self.pieces = rest;
        (group.len() > 2).then(|| &group[1..group.len() - 1])
    }

    fn list<T>(&mut self, item: fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.words("if not exists");
        let mut items = vec![item(self)?];
        while !self.pieces.is_empty() {
            self.symbol(',')?;
            items.push(item(self)?);
        }
        Some(items)
    }

    fn transaction_rule(&mut self) -> Parsed {
        let kind = value(self.group()?, "default")?;
        let kind = match kind.text()?.to_ascii_uppercase().as_str() {
            "LOCAL" => Transaction::Local,
            "XA" => Transaction::Xa,
            _ => return None,
        };
        Some(Ok(DistSql::AlterTransactionRule(kind)))
    }

    fn clock_rule(&mut self) -> Parsed {
        let group = self.group()?;
        let provider = value(group, "provider")?;
        let clock = match (provider.text()?, value(group, "enabled")?.is("true")) {
            (_, false) => Clock::Off,
            (name, true) if name.eq_ignore_ascii_case("redis") => Clock::TsoRedis,
            (_, true) => Clock::TsoLocal,
        };
        Some(Ok(DistSql::AlterClockRule(clock)))
    }

    fn storage_unit(&mut self) -> Option<(String, DataNode)> {
        let name = self.name()?;
        let group = self.group()?;
        let text = |key| value(group, key)?.text().map(str::to_owned);
        let (host, port, database) = if let Some(url) = text("url") {
            address(&url)?
        } else {
            let port = match &value(group, "port")?.token {
                Token::Number(port) | Token::Text(port) | Token::Quoted(port) => port.parse(),
                _ => return None,
            };
            (text("host")?, port.ok()?, text("db")?)
        };
        let node = DataNode {
            host,
            port,
            user: text("user")?,
            password: text("password").unwrap_or_default(),
            database,
        };
        Some((name, node))
    }

    fn table_rule(&mut self) -> Option<(String, String, String)> {
        let table = self.name()?;
        let group = self.group()?;
        let column = value(group, "sharding_column")?.name()?.to_owned();
        let count = value(group, "sharding-count").and_then(|piece| match &piece.token {
            Token::Number(text) | Token::Text(text) | Token::Quoted(text) => Some(text.clone()),
            _ => None,
        });
        Some((table, column, count.unwrap_or_else(|| "2".to_owned())))
    }
}

/// Host, port and database of `jdbc:postgresql://host:port/database?...`.
pub(super) fn address(url: &str) -> Option<(String, u16, String)> {
    let (_, rest) = url.split_once("://")?;
    let (address, database) = rest.split_once('/')?;
    let (host, port) = address.rsplit_once(':')?;
    let database = database.split('?').next()?;
    Some((host.to_owned(), port.parse().ok()?, database.to_owned()))
}

/// The value of `key = value` somewhere in `pieces`; the key is a word or in quotes.
fn value<'a>(pieces: &'a [Piece], key: &str) -> Option<&'a Piece> {
    let at = pieces.windows(2).position(|pair| {
        let name = pair[0].name().or_else(|| pair[0].text());
        name.is_some_and(|name| name.eq_ignore_ascii_case(key)) && pair[1].is_symbol('=')
    })?;
    pieces.get(at + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE"))"#;

    fn parse(sql: &str, version: Version) -> Result<DistSql, (String, String)> {
        let parsed = DistSql::parse(sql, version).expect("DistSQL");
        parsed.map_err(|refusal| (refusal.state, refusal.message))
    }

    #[test]
    fn the_lock_s_forms_by_release() {
        let with = format!("{LOCK} TIMEOUT 1000;");
        let lock = |timeout| {
            let state = ClusterState::ReadOnly;
            Ok(DistSql::Lock { state, timeout })
        };
        assert_eq!(parse(LOCK, Version::V5_5_1), lock(None));
        assert_eq!(parse(LOCK, Version::V5_5_3), lock(None));
        assert_eq!(parse(&with, Version::V5_5_2), lock(Some(1000)));
        assert_eq!(parse(&with, Version::V5_5_3), lock(Some(1000)));
        let (state, message) = parse(&with, Version::V5_5_1).unwrap_err();
        assert_eq!(state, "99999");
        assert!(message.starts_with("You have an error in your SQL syntax: LOCK CLUSTER"));
        for sql in [LOCK, "UNLOCK CLUSTER"] {
            let (state, message) = parse(sql, Version::V5_5_2).unwrap_err();
            assert_eq!(state, "58000");
            assert!(message.ends_with("java.lang.NumberFormatException: Cannot parse null string"));
        }
        assert_eq!(
            parse("unlock cluster", Version::V5_5_1),
            Ok(DistSql::Unlock { timeout: None })
        );
    }

    #[test]
    fn what_the_go_tool_sends() {
        let csn =
            r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="WRITE", PROPERTIES("lock_csn"=true)));"#;
        assert!(parse(csn, Version::V5_5_1).is_ok());
        let both = r#"LOCK CLUSTER WITH LOCK_STRATEGY(TYPE(NAME="READ_WRITE"))"#;
        let state = ClusterState::Unavailable;
        assert_eq!(
            parse(both, Version::V5_5_1),
            Ok(DistSql::Lock {
                state,
                timeout: None
            })
        );
        let import = parse("IMPORT METADATA 'abc='", Version::V5_5_1);
        assert_eq!(import, Ok(DistSql::ImportMetadata("abc=".to_owned())));
    }

    #[test]
    fn nonsense_is_a_syntax_error() {
        for sql in [
            "LOCK CLUSTER WITH WRITE TIMEOUT 1000",
            "LOCK CLUSTER",
            "UNLOCK CLUSTER NOW",
            "SHOW COMPUTE NODES PLEASE",
            "LABEL COMPUTE NODE",
        ] {
            assert_eq!(parse(sql, Version::V5_5_2).unwrap_err().0, "99999", "{sql}");
        }
        let other = LOCK.replace("WRITE", "NOSUCH") + " TIMEOUT 1";
        let (state, message) = parse(&other, Version::V5_5_2).unwrap_err();
        assert!(state == "58000" && message.contains("with type 'NOSUCH'"));
        assert!(DistSql::parse("LOCK TABLE t", Version::V5_5_2).is_none());
        assert!(DistSql::parse("SHOW work_mem", Version::V5_5_2).is_none());
    }

    #[test]
    fn storage_units_and_rules() {
        let sql = r#"REGISTER STORAGE UNIT ds_0 (HOST="127.0.0.1", PORT=5432, DB="bank_0", USER="u", PASSWORD="a'b"),
            ds_1 (URL="jdbc:postgresql://db.example:5433/bank_1?ssl=false", USER="u", PASSWORD="")"#;
        let Ok(DistSql::RegisterStorageUnits(units)) = parse(sql, Version::V5_5_2) else {
            panic!("not understood");
        };
        let node = |host: &str, port, database: &str, password: &str| DataNode {
            host: host.to_owned(),
            port,
            user: "u".to_owned(),
            password: password.to_owned(),
            database: database.to_owned(),
        };
        let expected = [
            ("ds_0".to_owned(), node("127.0.0.1", 5432, "bank_0", "a'b")),
            ("ds_1".to_owned(), node("db.example", 5433, "bank_1", "")),
        ];
        assert_eq!(units, expected);
        let sql = r#"CREATE SHARDING TABLE RULE account (STORAGE_UNITS(ds_0, ds_1), SHARDING_COLUMN=id,
            TYPE(NAME="mod", PROPERTIES("sharding-count"="4")))"#;
        let rule = ("account".to_owned(), "id".to_owned(), "4".to_owned());
        let expected = DistSql::ShardingTableRules(vec![rule]);
        assert_eq!(parse(sql, Version::V5_5_2), Ok(expected));
    }
}
