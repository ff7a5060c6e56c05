//! Every reference from code and documents to the specification (`spec CHAPTER NUMBER`) names a
//! section, a row or a rule that `docs/spec/` has.
#![expect(
    clippy::unwrap_used,
    reason = "a file of the repository that cannot be read fails the test"
)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const CHAPTERS: [&str; 5] = ["checkpoint", "ownership", "output", "wire", "qemu"];
/// Names that look like chapters and are none: a reference to them leads nowhere.
const NONE: [&str; 6] = [
    "heartbeat",
    "stream",
    "failover",
    "proxy",
    "ram",
    "replication",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// What a chapter can be asked for: numbers of headings, and names in bold at the start of a row
/// or of an item.
fn labels(chapter: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(format!("docs/spec/{chapter}.md"))).unwrap();
    let mut found = BTreeSet::new();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix('#') {
            let heading = heading.trim_start_matches('#').trim_start();
            if let Some((number, _)) = heading.split_once(' ') {
                found.insert(number.trim_end_matches('.').to_owned());
            }
        }
        let row = line
            .strip_prefix("| **")
            .or_else(|| line.strip_prefix("* **"));
        if let Some((names, _)) = row.and_then(|rest| rest.split_once("**")) {
            found.extend(names.split(", ").map(str::to_owned));
        }
    }
    found
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if !["target", ".git", "corpus", "artifacts"].contains(&&*name) {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") || name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// The words after `spec `, line breaks and comment marks between them taken out.
fn references(text: &str) -> Vec<(String, Vec<String>)> {
    let flat = text
        .lines()
        .map(|line| {
            line.trim_start()
                .trim_start_matches(['/', '!'])
                .trim_start()
        })
        .collect::<Vec<_>>()
        .join(" ");
    let mut found = Vec::new();
    for (at, _) in flat.match_indices("spec ") {
        let before = flat.get(..at).and_then(|s| s.chars().next_back());
        if before.is_some_and(|c| c.is_alphanumeric() || c == '/') {
            continue;
        }
        let mut words = flat[at + "spec ".len()..].split(' ');
        let Some(chapter) = words.next() else {
            continue;
        };
        let chapter = chapter.trim_end_matches([',', ')', '.', ';', ':']);
        if NONE.contains(&chapter) {
            found.push((chapter.to_owned(), Vec::new()));
        }
        if !CHAPTERS.contains(&chapter) {
            continue;
        }
        let mut labels = Vec::new();
        for word in words {
            let label = word.trim_end_matches([',', ')', '.', ';', ':']);
            let is_label = label.chars().all(|c| c.is_ascii_alphanumeric() || c == '.')
                && label.chars().any(|c| c.is_ascii_digit());
            if is_label {
                labels.push(label.to_owned());
            } else if label != "and" {
                break;
            }
            if word.ends_with([')', '.', ';', ':']) {
                break;
            }
        }
        found.push((chapter.to_owned(), labels));
    }
    found
}

#[test]
fn every_reference_to_the_specification_names_something_that_is_there() {
    let known = CHAPTERS.map(|chapter| (chapter, labels(chapter)));
    let mut files = Vec::new();
    sources(&root(), &mut files);
    let mut wrong = Vec::new();
    let mut checked = 0;
    for file in files {
        if file.ends_with("tests/spec/main.rs") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for (chapter, labels) in references(&text) {
            let Some((_, there)) = known.iter().find(|(name, _)| *name == chapter) else {
                wrong.push(format!("{}: spec {chapter}", file.display()));
                continue;
            };
            for label in labels {
                checked += 1;
                if !there.contains(&label) {
                    wrong.push(format!("{}: spec {chapter} {label}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked >= 40, "only {checked} references were found");
}

#[test]
fn the_specification_refers_to_files_that_exist() {
    for chapter in CHAPTERS.iter().chain(&["README"]) {
        let path = root().join(format!("docs/spec/{chapter}.md"));
        let text = fs::read_to_string(&path).unwrap();
        for (_, link) in text.match_indices("](").map(|(at, _)| {
            let rest = &text[at + 2..];
            (at, &rest[..rest.find(')').unwrap()])
        }) {
            let file = link.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                let target = path.parent().unwrap().join(file);
                assert!(target.exists(), "{}: {link}", path.display());
            }
        }
    }
}

#[test]
fn a_reference_is_read_over_line_breaks_and_lists() {
    let text = "/// Shut (spec ownership\n    /// O1, 6 and 7.2). Else spec wire 3: heads; no prospec wire 9.";
    assert_eq!(
        references(text),
        [
            (
                "ownership".into(),
                vec!["O1".into(), "6".into(), "7.2".into()]
            ),
            ("wire".into(), vec!["3".into()])
        ]
    );
}
