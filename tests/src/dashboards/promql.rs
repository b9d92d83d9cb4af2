//! As much of PromQL as tells what an expression asks for. Whether it is right, Prometheus says.

/// A metric with its matchers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    pub metric: String,
    /// As written, without a range.
    pub text: String,
}

/// Words that are followed by labels in parentheses.
const LISTS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Words that stand alone: operators, and aggregations in front of `by`.
const WORDS: [&str; 16] = [
    "and", "or", "unless", "bool", "offset", "sum", "min", "max", "avg", "count", "group", "topk", "bottomk", "quantile", "inf",
    "nan",
];

/// Every selector of an expression, in order.
#[must_use]
pub fn selectors(expression: &str) -> Vec<Selector> {
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        let (token, after) = match first {
            '"' | '\'' | '`' => quoted(rest),
            '[' => rest.split_at(rest.find(']').map_or(rest.len(), |end| end + 1)),
            // A number, with a unit perhaps.
            _ if first.is_ascii_digit() => while_in(rest, |c| c.is_ascii_alphanumeric() || c == '.'),
            _ if is_name(first) => while_in(rest, |c| is_name(c) || c.is_ascii_digit()),
            _ => rest.split_at(first.len_utf8()),
        };
        rest = after;
        if !token.starts_with(is_name) {
            continue;
        }
        let follows = after.trim_start();
        if LISTS.contains(&token) {
            rest = follows.find(')').map_or("", |end| &follows[end + 1..]);
        } else if !follows.starts_with('(') && !WORDS.contains(&token) {
            let matchers = matchers(after);
            rest = &after[matchers.len()..];
            found.push(Selector {
                metric: token.to_owned(),
                text: format!("{token}{matchers}"),
            });
        }
    }
    found
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || c == ':'
}

fn while_in(text: &str, is_in: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !is_in(c)).unwrap_or(text.len()))
}

/// A string with its quotes, and what follows.
fn quoted(text: &str) -> (&str, &str) {
    let mut characters = text.char_indices();
    let Some((_, quote)) = characters.next() else {
        return (text, "");
    };
    while let Some((at, character)) = characters.next() {
        if character == '\\' && quote != '`' {
            characters.next();
        } else if character == quote {
            return text.split_at(at + 1);
        }
    }
    (text, "")
}

/// What stands in braces at the beginning, braces included.
fn matchers(text: &str) -> &str {
    if !text.starts_with('{') {
        return "";
    }
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        rest = match first {
            '"' | '\'' | '`' => quoted(rest).1,
            _ => &rest[first.len_utf8()..],
        };
        if first == '}' {
            break;
        }
    }
    &text[..text.len() - rest.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(expression: &str) -> Vec<String> {
        selectors(expression).into_iter().map(|selector| selector.text).collect()
    }

    #[test]
    fn selectors_are_found_and_nothing_else() {
        for (expression, wanted) in [
            ("up", vec!["up"]),
            (
                "sum by (node, reason) (rate(a_total{x=~\"b|}c\"}[5m])) > 0.1",
                vec!["a_total{x=~\"b|}c\"}"],
            ),
            ("sum(a{}) by (up) / on (node) group_left (pod) b offset 10m", vec!["a{}", "b"]),
            (
                "histogram_quantile(0.5, sum by (le) (rate(h_bucket[$__rate_interval])))",
                vec!["h_bucket"],
            ),
            (
                "(a > 0) unless (b <= 3 * c{d='\\'{'}) or absent(e == 1)",
                vec!["a", "b", "c{d='\\'{'}", "e"],
            ),
            ("max_over_time((a - time())[1d:10m]) < bool 1e3", vec!["a"]),
            ("topk(10, a) + count_values(\"version\", b)", vec!["a", "b"]),
        ] {
            assert_eq!(texts(expression), wanted, "{expression}");
        }
        assert_eq!(selectors("rate(a_total{b=\"c\"}[1m])")[0].metric, "a_total");
    }
}
