//! `colod`: two hosts, one VM. Everything is in the library beside it.

fn main() -> std::process::ExitCode {
    colod::cli::main()
}
