//! Whether what was recovered is one moment of the bank.

use std::collections::HashMap;

use futures_util::future::try_join_all;
use jiff::Timestamp;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::{ACCOUNTS, BALANCE, Diary, Entry, Outcome};

/// When a point was made, as far as its clients can tell.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// What was acknowledged before is in it.
    pub from: Timestamp,
    /// What was begun after is not.
    pub to: Timestamp,
}

impl Window {
    /// Nothing is known.
    pub const ANY: Self = Self {
        from: Timestamp::MIN,
        to: Timestamp::MAX,
    };
}

/// What a moment held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Transfers in its ledger.
    pub transfers: usize,
    /// Acknowledged before it: all of them are there.
    pub required: usize,
    /// Begun after it or rolled back: none of them is there.
    pub forbidden: usize,
}

/// What a ledger has of a transfer: legs that it should have, legs, their sum.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    wanted: i64,
    legs: i64,
    sum: i64,
}

/// Holds all nodes against each other, and against what the clients know.
///
/// # Errors
/// All that is wrong, in words.
///
/// # Panics
/// If there are more nodes than a number holds.
pub async fn check(nodes: &[Client], diary: &Diary, window: Window) -> Result<Verdict, String> {
    let (mut wrong, mut sum) = (Vec::new(), 0);
    let mut found: HashMap<i64, Found> = HashMap::new();
    let read = try_join_all(nodes.iter().map(read)).await?;
    for (number, node) in read.into_iter().enumerate() {
        if node.prepared > 0 {
            wrong.push(format!(
                "{} transactions are prepared on node {number}",
                node.prepared
            ));
        }
        if node.accounts != ACCOUNTS {
            wrong.push(format!("node {number} has {} accounts", node.accounts));
        }
        if node.unexplained > 0 {
            wrong.push(format!(
                "{} balances of node {number} are not what its ledger says",
                node.unexplained
            ));
        }
        sum += node.sum;
        for (transfer, part) in node.ledger {
            let whole = found.entry(transfer).or_default();
            whole.wanted = part.wanted;
            whole.legs += part.legs;
            whole.sum += part.sum;
        }
    }
    let all = ACCOUNTS * BALANCE * i64::try_from(nodes.len()).expect("few nodes");
    if sum != all {
        wrong.push(format!("the sum is {sum} instead of {all}"));
    }
    let halves = found
        .iter()
        .filter(|(_, found)| found.legs != found.wanted || found.sum != 0);
    if let (count @ 1.., Some(one)) = (
        halves.clone().count(),
        halves.min_by_key(|(transfer, _)| **transfer),
    ) {
        wrong.push(format!("{count} transfers are halves, {one:?} is one"));
    }
    let verdict = against(&found, diary, window, &mut wrong);
    if wrong.is_empty() {
        Ok(verdict)
    } else {
        Err(wrong.join("; "))
    }
}

fn against(
    found: &HashMap<i64, Found>,
    diary: &Diary,
    window: Window,
    wrong: &mut Vec<String>,
) -> Verdict {
    let (mut required, mut forbidden) = (0, 0);
    let (mut lost, mut extra): (Vec<&Entry>, Vec<&Entry>) = (Vec::new(), Vec::new());
    for entry in &diary.entries {
        let there = found.contains_key(&entry.transfer);
        match entry.outcome {
            Outcome::Acknowledged(at) if at < window.from => {
                required += 1;
                lost.extend((!there).then_some(entry));
            }
            Outcome::RolledBack => {
                forbidden += 1;
                extra.extend(there.then_some(entry));
            }
            _ if entry.begun > window.to => {
                forbidden += 1;
                extra.extend(there.then_some(entry));
            }
            _ => {}
        }
    }
    if let Some(entry) = lost.first() {
        wrong.push(format!(
            "{} were acknowledged before {} and are lost: {entry:?}",
            lost.len(),
            window.from
        ));
    }
    if let Some(entry) = extra.first() {
        wrong.push(format!(
            "{} were begun after {} or rolled back, and are there: {entry:?}",
            extra.len(),
            window.to
        ));
    }
    Verdict {
        transfers: found.len(),
        required,
        forbidden,
    }
}

struct Read {
    prepared: i64,
    accounts: i64,
    sum: i64,
    unexplained: i64,
    ledger: Vec<(i64, Found)>,
}

/// Everything that is asked of one node.
async fn read(node: &Client) -> Result<Read, String> {
    let accounts = format!(
        "SELECT (SELECT count(*) FROM pg_prepared_xacts), count(*), sum(balance)::bigint, \
         count(*) FILTER (WHERE balance <> {BALANCE} + coalesce(l.amount, 0)) FROM account a \
         LEFT JOIN (SELECT account, sum(amount) AS amount FROM ledger GROUP BY account) l ON l.account = a.id"
    );
    let of_accounts = numbers(node, &accounts).await?;
    let [prepared, accounts, sum, unexplained] = of_accounts
        .first()
        .and_then(|row| row.as_slice().try_into().ok())
        .ok_or("no row")?;
    let ledger =
        "SELECT transfer, legs, count(*), sum(amount)::bigint FROM ledger GROUP BY transfer, legs";
    let rows = numbers(node, ledger).await?.into_iter();
    let ledger = rows.map(|row| {
        let found = Found {
            wanted: row[1],
            legs: row[2],
            sum: row[3],
        };
        (row[0], found)
    });
    Ok(Read {
        prepared,
        accounts,
        sum,
        unexplained,
        ledger: ledger.collect(),
    })
}

async fn numbers(node: &Client, sql: &str) -> Result<Vec<Vec<i64>>, String> {
    let answer = node
        .simple_query(sql)
        .await
        .map_err(|error| format!("{sql}: {error:?}"))?;
    let rows = answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let numbers = rows.map(|row| {
        let columns = (0..row.len()).map(|column| {
            row.get(column)
                .and_then(|text| text.parse().ok())
                .unwrap_or(0)
        });
        columns.collect()
    });
    Ok(numbers.collect())
}
