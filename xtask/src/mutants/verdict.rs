//! Reading what the test harnesses print: which tests failed, and what each said.

use std::collections::BTreeMap;

/// What a test came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// With all that it said.
    Failed(String),
}

/// The outcomes by test, as Rust's harness or our suites' runner prints them.
pub fn outcomes(output: &str) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    // What follows a test's heading is what it said.
    let mut speaker: Option<String> = None;
    // What it printed past the harness may stand before its verdict.
    let mut running: Option<String> = None;
    for line in output.lines() {
        let heading = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        let late = matches!(line, "ok" | "FAILED").then(|| running.take()).flatten();
        let heading = late.as_deref().map(|name| (name, line)).or(heading);
        if let Some((name, verdict)) = heading {
            let failed = verdict.starts_with("FAILED");
            speaker = failed.then(|| name.to_owned());
            if failed {
                outcomes.insert(name.to_owned(), Outcome::Failed(String::new()));
            } else if verdict.starts_with("ok") {
                outcomes.insert(name.to_owned(), Outcome::Passed);
            } else {
                running = Some(name.to_owned());
            }
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            speaker = Some(name.to_owned());
        } else if let Some(Outcome::Failed(said)) = speaker.as_ref().and_then(|name| outcomes.get_mut(name)) {
            said.push_str(line);
            said.push('\n');
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_harnesses_are_read() {
        let output = "\nrunning 2 tests\ntest a::good ... ok\ntest a::bad ... FAILED\n\nfailures:\n\n---- a::bad stdout ----\n\
                      thread 'a::bad' panicked at a.rs:1:\nreached it\n\nfailures:\n    a::bad\n\ntest result: FAILED. 1 passed\n";
        let read = outcomes(output);
        assert_eq!(read["a::good"], Outcome::Passed);
        assert!(matches!(&read["a::bad"], Outcome::Failed(said) if said.contains("reached it")));
        let output = "\nrunning 2 tests\ntest mesh::bad ... FAILED\n--- the end of a log\nexpected a refusal\n\
                      test mesh::good ... ok (1.0 s)\nafterwards\n";
        let read = outcomes(output);
        assert_eq!(read["mesh::good"], Outcome::Passed);
        assert!(matches!(&read["mesh::bad"], Outcome::Failed(said) if said.contains("refusal") && !said.contains("afterwards")));
        assert!(outcomes("error: could not compile").is_empty());
        let output = "test a::loud ... wrote a file\nFAILED\n\nfailures:\n\n---- a::loud stdout ----\nreached it\n\
                      test a::well ... wrote a file\nok\nok\n";
        let read = outcomes(output);
        assert!(matches!(&read["a::loud"], Outcome::Failed(said) if said.contains("reached it")));
        assert_eq!((&read["a::well"], read.len()), (&Outcome::Passed, 2));
    }
}
