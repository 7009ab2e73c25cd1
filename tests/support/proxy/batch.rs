//! What the real proxy takes for a batch: three or more executions of one statement, through one portal, before one Sync (its
//! `PostgreSQLAggregatedCommandPacket`).

use std::ops::Range;

use super::wire::Request;

/// Fewer are executed one by one.
const FEWEST: usize = 3;

/// Where among the collected messages a batch begins and ends, from its first Bind to its last Execute.
pub(super) fn find(requests: &[Request]) -> Option<Range<usize>> {
    let (mut statement, mut portal) = (None::<&str>, None::<&str>);
    let (mut parses, mut binds, mut executes) = (0, 0, 0);
    let (mut begin, mut end) = (None, 0);
    for (at, request) in requests.iter().enumerate() {
        match request {
            Request::Parse(parse) => {
                parses += 1;
                if parses > 1 || *statement.get_or_insert(&parse.name) != parse.name {
                    break;
                }
            }
            Request::Bind(bind) => {
                begin.get_or_insert(at);
                let same = *statement.get_or_insert(&bind.statement) == bind.statement
                    && *portal.get_or_insert(&bind.portal) == bind.portal;
                if !same {
                    break;
                }
                binds += 1;
            }
            Request::Execute { portal: name, .. } => {
                end = at;
                if *portal.get_or_insert(name) != name {
                    break;
                }
                executes += 1;
            }
            _ => {}
        }
    }
    let is_batch = binds == executes && binds >= FEWEST;
    begin.filter(|_| is_batch).map(|begin| begin..end + 1)
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Bind, Parse};
    use super::*;

    fn parse(name: &str) -> Request {
        Request::Parse(Parse {
            name: name.to_owned(),
            sql: String::new(),
            types: vec![],
        })
    }

    fn bind(statement: &str, portal: &str) -> Request {
        Request::Bind(Bind {
            portal: portal.to_owned(),
            statement: statement.to_owned(),
            formats: vec![],
            values: vec![],
            result_formats: vec![],
        })
    }

    fn execute(portal: &str) -> Request {
        let portal = portal.to_owned();
        Request::Execute { portal, rows: 0 }
    }

    fn times(count: usize) -> Vec<Request> {
        (0..count)
            .flat_map(|_| [bind("s", ""), execute("")])
            .collect()
    }

    #[test]
    fn three_or_more_of_one_statement() {
        assert_eq!(find(&times(2)), None);
        assert_eq!(find(&times(3)), Some(0..6));
        let mut with_parse = vec![parse("s")];
        with_parse.extend(times(4));
        assert_eq!(find(&with_parse), Some(1..9));
    }

    #[test]
    fn others_are_none() {
        let mut two_portals = times(2);
        two_portals.extend([bind("s", "p"), execute("p")]);
        assert_eq!(find(&two_portals), None);
        let mut two_statements = times(2);
        two_statements.extend([bind("t", ""), execute("")]);
        assert_eq!(find(&two_statements), None);
        let mut twice_parsed = vec![parse("s"), parse("s")];
        twice_parsed.extend(times(3));
        assert_eq!(find(&twice_parsed), None);
        assert_eq!(find(&[parse("s")]), None);
    }
}
