"""What mopefuse promises, each with the tests that hold it in the quick tier, and what only the full tier adds to it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIERS = {"process", "matrix", "soak"}  # markers of tests that `make test` leaves out
# Of each claim: "quick", tests that hold it in `make test`; "full", the tests about it that only `make test-all` runs.
CLAIMS: dict[str, dict[str, str]] = {
    "prompts as keys and values equal inserted tokens, in every encoder": {
        "quick": "test_encoders::test_keys_and_values_equal_inserted_tokens "
        "test_prompts::test_prompts_match_the_definition "
        "test_windows::test_it_is_attention_with_the_prompt_in_every_window",
        "full": "test_encoders::test_which_families_take_tokens_ahead_of_their_own",
    },
    "prompts can be mapped from tokens, of which psi is the limit, and padding has no effect": {
        "quick": "test_token_conditions::test_one_token_equal_to_psi_is_the_pooled_condition "
        "test_token_conditions::test_padding_has_no_effect "
        "test_token_conditions::test_a_sample_does_not_depend_on_its_batch "
        "test_token_conditions::test_a_run_with_cached_tokens_takes_the_course_of_one_without",
    },
    "without prompts the backbone is untouched, to the bit": {
        "quick": "test_encoders::test_without_prompts_the_backbone_is_untouched "
        "test_fusion::test_zero_gated_prompts_start_as_the_frozen_encoder_to_the_bit",
    },
    "every encoder keeps the contract": {
        "quick": "test_encoders::test_every_family_keeps_the_contract "
        "test_lora::test_an_adapted_encoder_keeps_the_contract",
        "full": "test_image_sizes::test_inspect_and_training_see_the_declared_size "
        "test_image_sizes::test_size_overrides_for_models_of_timm",
    },
    "a prediction does not depend on the rest of its batch": {
        "quick": "test_fusion::test_a_sample_does_not_depend_on_its_batch "
        "test_tuned::test_a_sample_does_not_depend_on_its_batch "
        "test_pmf::test_a_sample_does_not_depend_on_its_batch_and_answers_twice_the_same",
    },
    "threads may share a model": {
        "quick": "test_threads::test_threads_share_an_encoder test_threads::test_threads_share_a_model "
        "test_threads::test_threads_share_what_was_loaded",
    },
    "exactly the declared parameters are trained, saved and exported": {
        "quick": "test_fusion::test_exactly_these_parameters_learn_and_are_saved "
        "test_tuned::test_all_that_is_ours_learns_and_nothing_else",
        "full": "test_method_sizes::test_trainable_parameters_at_vit_and_bert "
        "test_lora::test_trainable_parameters_at_vit_b_and_bert_base",
    },
    "a model is saved, copied and converted as a torch module": {
        "quick": "test_converted::test_what_was_loaded_prepares_and_learns_as_before "
        "test_converted::test_every_method_can_be_converted",
        "full": "test_converted::test_every_method_is_saved_whole test_converted::test_every_encoder_is_saved_whole "
        "test_converted::test_methods_that_read_images_among_words_can_be_saved_and_converted "
        "test_api::test_the_command_line_takes_a_saved_model",
    },
    "half precision and recomputed activations change no more than they must": {
        "quick": "test_autocast::test_every_method_runs_in_half_precision "
        "test_recompute::test_gradients_are_the_same_to_the_bit",
    },
    "a compiled model is one graph with the same numbers": {
        "quick": "test_compile::test_a_model_that_learns_is_one_graph_with_the_same_numbers",
        "full": "test_compile::test_a_compiled_run_learns_what_a_run_learns "
        "test_compile::test_steps_of_one_shape_are_compiled_once_and_smaller_batches_once_more "
        "test_prefix_cache::test_a_compiled_run_takes_the_course_of_one_that_is_not",
    },
    "a resumed run equals an uninterrupted one, to the bit": {
        "quick": "test_train::test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit "
        "test_missing::test_a_resumed_run_with_dropout_equals_an_uninterrupted_one",
        "full": "test_inserting::test_it_is_an_ordinary_run "
        "test_train::test_killed_at_random_moments_and_resumed_it_ends_bit_equal "
        "test_kills::test_the_first_moments_of_a_run",
    },
    "the same seed gives the same run, whatever the number of workers": {
        "quick": "test_train::test_the_number_of_workers_changes_nothing "
        "test_fusion::test_the_same_seed_gives_the_same_model_whatever_was_drawn_before",
    },
    "a signal stops a run after its step, with a checkpoint and the exit code of the signal": {
        "quick": "test_terminal::test_a_stopped_run_prints_the_resume_command_and_resumes "
        "test_train::test_ctrl_c_in_the_test_after_the_last_step_loses_nothing",
        "full": "test_train::test_a_group_signal_does_not_kill_the_data_workers "
        "test_plugins::test_a_plugin_that_hangs_is_stopped_by_ctrl_c",
    },
    "SIGKILL leaves no half-written file, and the next call succeeds": {
        "quick": "test_kills::test_export test_kills::test_predict test_kills::test_index_and_images "
        "test_checkpoint::test_a_kill_while_publishing_leaves_what_was_there",
        "full": "test_kills::test_export_over_an_earlier_one test_kills::test_report test_kills::test_data_prepare "
        "test_kills::test_data_make test_kills::test_study "
        "test_checkpoint::test_a_kill_at_any_moment_of_a_save_loop_leaves_the_newest_whole",
    },
    "one process writes a run": {
        "quick": "test_run::test_the_lock_of_a_living_process_is_respected_by_all_that_write "
        "test_run::test_of_several_that_find_the_lock_of_a_dead_process_one_takes_it_over",
        "full": "test_kills::test_of_two_processes_on_one_run_one_trains_it",
    },
    "the cache gives what would be computed, to any number of processes": {
        "quick": "test_data_cache::test_cached_features_and_images_give_the_same_run "
        "test_feature_store::test_of_two_that_computed_the_same_the_first_published_holds_for_both "
        "test_feature_store::test_several_ranks_compute_each_sample_once_and_use_the_same_values",
        "full": "test_feature_store::test_ranks_without_a_common_cache_use_the_same_values_too "
        "test_feature_store::test_processes_that_compute_at_the_same_time_agree_to_the_bit "
        "test_feature_store::test_a_killed_process_leaves_what_it_published_and_nothing_half_written "
        "test_feature_store::test_a_million_samples_are_looked_up_without_an_object_for_each "
        "test_kills::test_several_processes_on_one_cache_some_of_them_killed",
    },
    "training starts at the first prompted layer, with the results of the whole model": {
        "quick": "test_prefix_cache::test_a_run_with_the_cache_takes_the_course_of_one_without "
        "test_prefix_cache::test_early_layers_run_once_for_each_sample_and_not_in_training "
        "test_prefix_cache::test_a_resumed_run_is_equal_to_the_bit",
        "full": "test_prefix_cache::test_two_processes_equal_one",
    },
    "several processes give what one does": {
        "quick": "test_distributed::test_two_processes_equal_one test_predict::test_several_processes_give_the_same_file",
        "full": "test_distributed::test_one_process_speaks_for_all test_mlp::test_two_processes_train_as_one "
        "test_bad_data::test_a_split_smaller_than_the_processes_is_evaluated_exactly "
        "test_distributed::test_the_others_wait_for_the_main_process_as_long_as_it_lives "
        "test_distributed::test_a_process_whose_share_takes_longer_is_waited_for "
        "test_token_conditions::test_two_processes_equal_one",
    },
    "evaluation is deterministic and repeats what training measured": {
        "quick": "test_cli::test_eval_is_deterministic_and_repeats_what_training_measured",
        "full": "test_scale::test_memory_of_an_evaluation_does_not_grow_with_rows_times_labels",
    },
    "no archive runs code, reads outside its folder or fills the memory": {
        "quick": "test_pt2::test_a_hostile_archive_is_refused_and_runs_nothing "
        "test_pt2::test_torch_alone_would_run_the_code "
        "test_artefacts::test_F_73_a_pickle_in_place_of_weights_runs_nothing "
        "test_artefacts::test_F_76_nothing_outside_is_opened test_layers::test_nothing_loads_pickles",
        "full": "test_pt2::test_a_changed_archive_loads_or_is_refused test_pt2::test_threads_load_archives_at_once",
    },
    "a damaged or different artefact is found and named": {
        "quick": "test_artefacts::test_F_75_one_flipped_bit_of_the_weights_is_found "
        "test_export::test_a_file_that_was_changed_is_named",
        "full": "test_encoder_description::test_a_run_is_not_loaded_onto_an_encoder_that_differs",
    },
    "nothing outside the data root is read, and images are decoded safely": {
        "quick": "test_images::test_a_path_out_of_the_root_is_refused_and_nothing_is_opened "
        "test_images::test_too_many_pixels_are_refused_from_the_header",
    },
    "an error is one line with a fix and the exit code of its family": {
        "quick": "test_cli::test_a_process_ends_with_the_exit_code_of_its_error "
        "test_cli::test_an_error_is_one_line_of_what_where_and_fix "
        "test_memory_limits::test_memory_that_runs_out_is_exit_7",
        "full": "test_memory_limits::test_a_process_with_little_address_space_ends_with_one_line "
        "test_artefacts::test_F_72_a_torchvision_of_another_torch_is_named_with_both_versions "
        "test_written::test_a_full_disk_is_an_error_with_a_fix_that_the_command_has",
    },
    "bad data and doubtful labels are reported with their rows": {
        "quick": "test_cli::test_bad_data_is_an_error_that_lists_every_line "
        "test_label_check::test_a_column_of_lists_is_refused_by_check_and_train_and_read_with_the_flag",
    },
    "an ONNX graph or pt2 bundle predicts what the model predicts": {
        "quick": "test_export::test_a_bundle_predicts_as_the_run_does",
        "full": "test_export::test_a_graph_with_other_outputs_is_not_published "
        "test_export::test_several_labels_keep_the_thresholds_of_the_run "
        "test_lora::test_an_export_predicts_as_the_run_does test_pmf::test_it_is_an_ordinary_run_and_exports "
        "test_linear::test_the_exported_graph_predicts_the_same "
        "test_mlp::test_the_exported_graph_predicts_the_same "
        "test_cross_attention::test_the_exported_graph_predicts_the_same "
        "test_cross_attention::test_the_exported_graph_masks_padding test_several::test_export_and_report "
        "test_export::test_a_bundle_that_reads_texts_otherwise_is_not_published "
        "test_export::test_eight_bits_are_smaller_and_measured_before_and_after "
        "test_export::TestWeightsBesideTheGraph::test_they_are_needed_whole_and_inside_the_folder "
        "test_graph::test_onnx_predicts_as_the_model_does "
        "test_mlp::test_it_is_evaluated_exported_and_reported_as_any_run "
        "test_cross_attention::test_it_is_evaluated_exported_and_reported_as_any_run "
        "test_token_conditions::test_a_bundle_predicts_as_the_run_does",
    },
    "a bundle needs no torch": {
        "quick": "test_predictor::test_the_runtime_imports_no_torch test_predictor::test_tokens_are_those_of_the_encoder",
        "full": "test_cli::test_a_run_waits_for_no_library_that_its_encoders_do_not_need "
        "test_predictor::test_a_bundle_predicts_without_torch "
        "test_written::test_a_run_without_torch_is_an_error_with_the_package_to_install",
    },
    "an encoder can be swapped, and weights that do not depend on it are kept": {
        "quick": "test_swap::test_nothing_swapped_is_everything_kept "
        "test_swap::test_a_new_complementary_encoder_leaves_prompts_experts_and_head "
        "test_swap::test_a_swapped_run_that_is_killed_resumes_to_the_same_end "
        "test_swap::test_tuning_is_compared_with_training_from_scratch",
        "full": "test_swap_learning::test_with_another_text_encoder_it_reaches_sooner_what_training_from_scratch_ends_with "
        "test_swap::test_two_processes_swap_tune_and_compare_as_one_does",
    },
    "a command does its work if its standard streams are closed": {
        "quick": "test_standard_streams::test_training_with_closed_streams_comes_to_its_end "
        "test_standard_streams::test_a_result_that_cannot_be_printed_is_an_error",
        "full": "test_written::test_every_file_is_written_as_the_umask_has_it "
        "test_standard_streams::test_a_study_with_closed_streams_comes_to_its_end",
    },
    "a study gives the same table whatever interrupts it": {
        "quick": "test_study::test_what_is_finished_is_not_run_again_and_what_is_added_is",
        "full": "test_study::test_a_cell_terminated_from_outside_is_recorded_as_failed "
        "test_study::test_a_cell_that_fails_is_recorded_and_the_others_go_on "
        "test_room::test_a_study_runs_one_at_a_time_where_memory_has_no_room "
        "test_study::test_a_finished_cell_of_every_method_counts_as_finished "
        "test_study::test_killed_at_random_and_started_again_it_gives_the_same_table "
        "test_study::test_a_cell_whose_process_is_killed_is_recorded_and_the_others_go_on "
        "test_study::test_a_stop_signal_saves_running_cells_and_leaves_no_process "
        "test_study::test_notices_of_cells_are_shown_once",
    },
    "a search proposes what Optuna does and never looks at the test split": {
        "quick": "test_search::test_settings_that_come_again_are_one_run_and_a_failed_one_stays_failed",
        "full": "test_search::test_trials_of_one_batch_are_the_same_for_any_number_of_jobs "
        "test_search::test_the_validation_split_chooses_what_comes_next "
        "test_search::test_killed_and_started_again_it_finds_the_same "
        "test_search::test_trials_are_those_that_optuna_proposes_for_these_values "
        "test_search::test_the_test_split_chooses_nothing "
        "test_search::test_every_trial_is_an_ordinary_run_with_its_settings "
        "test_search::test_what_is_finished_is_not_run_again_and_more_trials_go_on "
        "test_search::test_the_table_marks_the_best_and_its_command_trains "
        "test_search::test_compare_shows_the_trials_and_says_that_they_are_not_to_be_chosen_by_test "
        "test_search::test_a_metric_that_the_data_have_not_is_refused",
    },
    "rows may lack a modality, as the model was trained for": {
        "quick": "test_missing_eval::test_predict_answers_rows_with_holes_where_the_model_learned_to "
        "test_missing_values::test_a_value_that_is_not_there_is_what_the_policy_says",
        "full": "test_missing_eval::test_a_grid_its_table_and_its_part_of_the_report "
        "test_missing_eval::test_bundles_predict_rows_with_holes_as_their_run_does "
        "test_missing_eval::test_another_seed_or_checkpoint_takes_nothing_from_what_is_kept",
    },
    "a plugin adds an encoder, a method, a modality or data, and a bad one harms nobody": {
        "quick": "test_plugin_docs::test_the_method_and_the_promptable_encoder_train_and_are_swapped "
        "test_new_plugin::test_a_new_plugin_trains_as_either_encoder",
        "full": "test_plugins::test_lists_import_no_plugin "
        "test_plugin_docs::test_the_plugin_of_nine_lines_is_installed_inspected_and_keeps_the_contract "
        "test_artefact_versions::test_F_107_a_run_records_its_plugins_and_is_refused_without_them "
        "test_new_plugin::test_a_new_plugin_passes_its_own_test_and_is_inspected "
        "test_new_plugin::test_the_contract_test_of_a_new_plugin_can_fail "
        "test_new_plugin::test_public_names_are_there_and_cost_nothing_until_used "
        "test_plugins::test_the_list_shows_what_each_entry_point_resolves_to",
    },
    "a model goes to the Hugging Face Hub and comes back": {
        "quick": "test_push::test_the_adapter_and_nothing_else_is_sent_in_one_commit "
        "test_push::test_a_hub_that_cannot_be_reached_is_explained",
        "full": "test_push::test_another_machine_gets_the_answers_of_the_run_also_offline "
        "test_written::test_what_would_be_pushed_is_listed_without_a_network",
    },
    "bench measures what it reports": {
        "quick": "test_bench::test_tokens_inserted_and_keys_and_values_give_the_same "
        "test_bench::test_a_step_of_a_row_is_a_step_of_training",
        "full": "test_bench::test_the_command_prints_one_object_with_both_ratios "
        "test_bench::test_every_row_is_there_with_every_number "
        "test_bench::test_what_is_counted_is_what_a_run_trains_and_saves "
        "test_bench::test_growth_is_measured_along_every_axis "
        "test_device::test_numbers_too_small_to_matter_are_zero_where_that_is_asked_for "
        "test_bench::test_a_failed_or_killed_process_is_an_error "
        "test_bench::test_starts_are_timed_for_every_kind_of_answer test_bench::test_processes_share_a_batch "
        "test_bench::test_memory_is_what_a_call_took_at_its_peak "
        "test_bench::test_train_or_infer_alone_is_measured_alone",
    },
    "every command and every piece of Python that the documentation shows runs": {
        "quick": "test_readme::test_every_command_and_every_piece_of_python_runs",
        "full": "test_docs::test_every_command_and_every_piece_of_python_of_a_page_runs "
        "test_docs::test_the_notebook_runs_from_top_to_bottom test_docs::test_the_site_builds_without_a_warning",
    },
    "every recipe runs": {
        "quick": "test_recipes::test_two_steps_run_on_tiny_encoders_and_data",
    },
    "nothing that a command prints escapes into the terminal or the page": {
        "quick": "test_escapes::test_predict test_report::test_hostile_labels_texts_and_ids_are_shown_as_they_are",
    },
    "imports go down only": {
        "quick": "test_layers::test_imports_go_down_only",
    },
}


def listed_tests(claim: str, tier: str) -> list[str]:
    return CLAIMS[claim].get(tier, "").split()


def function_of(test: str) -> Any:
    module, *names = test.split("::")
    found: Any = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def marks_of(marked: Any) -> list[pytest.Mark]:
    marks = getattr(marked, "pytestmark", [])
    return list(marks) if isinstance(marks, list) else [marks]


def tier_of(marks: Any) -> set[str]:
    return {mark.name for mark in marks} & TIERS


def has_a_quick_case(test: str) -> bool:
    """Whether `make test` runs the test with some of its parameters."""
    module = importlib.import_module(test.partition("::")[0])
    marks = marks_of(module) + marks_of(function_of(test))
    marks += marks_of(function_of(test.rpartition("::")[0])) if test.count("::") == 2 else []
    lists = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    return not tier_of(marks) and all(any(not tier_of(getattr(case, "marks", ())) for case in cases) for cases in lists)


def all_tests() -> Iterator[str]:
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(file.stem)
        for name, value in vars(module).items():
            if name.startswith("test_") and value.__module__ == file.stem:
                yield f"{file.stem}::{name}"
            if name.startswith("Test") and inspect.isclass(value) and value.__module__ == file.stem:
                yield from (f"{file.stem}::{name}::{test}" for test in vars(value) if test.startswith("test_"))


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_has_a_test_in_the_quick_tier(claim: str) -> None:
    assert listed_tests(claim, "quick")
    assert [test for test in listed_tests(claim, "quick") if not has_a_quick_case(test)] == []


def test_what_only_the_full_tier_runs_adds_to_a_claim_of_the_quick_one() -> None:
    listed = sorted(test for claim in CLAIMS for test in listed_tests(claim, "full"))
    assert listed == sorted(test for test in all_tests() if not has_a_quick_case(test))
